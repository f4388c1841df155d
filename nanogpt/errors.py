"""Every error of the project, in one tree.

    NanogptError
    ├── StartupError            a process can't start: one clear line, exit code 2
    │   ├── ConfigError         an option, key or value
    │   └── CheckpointError     weights or tokenizer files
    ├── EngineError             the engine can't go on
    └── ApiError                an answer to a client, in OpenAI's shape
        ├── InvalidRequest 400
        │   └── ContextLengthExceeded
        ├── Unauthorized 401    invalid_api_key
        ├── Banned 403          user_banned
        ├── NotFound 404        not_found
        │   └── ModelNotFound   model_not_found
        ├── MethodNotAllowed 405
        ├── Conflict 409
        ├── PayloadTooLarge 413
        ├── UnsupportedMediaType 415
        ├── RateLimited 429     requests, tokens
        ├── ServerError 500
        └── Unavailable 503     overloaded, draining, starting

A message says what was wrong, what is allowed and how to mend it.
"""


class NanogptError(Exception):
    """Anything that this project raises on purpose."""


class StartupError(NanogptError):
    """A process can't start; the message is the one line that the operator sees."""


class ConfigError(StartupError):
    """An option, a key or a value of the configuration is wrong."""


class CheckpointError(StartupError):
    """Weights or tokenizer files are missing, unreadable or don't fit."""


class EngineError(NanogptError):
    """The engine can't go on; its process should end and be started anew."""


class ApiError(NanogptError):
    """An answer to a client: HTTP status and the four fields of OpenAI's error object."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON object of the answer; all four fields are always there."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ApiError):
    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(ApiError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Banned(ApiError):
    status, type, code = 403, "permission_error", "user_banned"


class NotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ApiError):
    status, type = 405, "invalid_request_error"


class Conflict(ApiError):
    status, type = 409, "conflict_error"


class PayloadTooLarge(ApiError):
    status, type = 413, "invalid_request_error"


class UnsupportedMediaType(ApiError):
    status, type = 415, "invalid_request_error"


class RateLimited(ApiError):
    status, type = 429, "rate_limit_exceeded"


class ServerError(ApiError):
    status, type = 500, "server_error"


class Unavailable(ApiError):
    """Not now: `code` says why, and a Retry-After header when to come back."""

    status, type, code = 503, "server_error", "overloaded"

    def __init__(self, message: str, *, code: str = "overloaded", retry_after: int = 1) -> None:
        super().__init__(message, code=code, headers={"Retry-After": str(retry_after)})


def draining() -> Unavailable:
    """No new requests are taken by this process."""
    return Unavailable(
        "the server is shutting down; send the request to another one or try again",
        code="draining",
        retry_after=5,
    )


def too_many_choices(count: int, most: int) -> InvalidRequest:
    """More than may ever be in progress at once."""
    return InvalidRequest(
        f"the request has {count} choices (prompts times n or best_of), this server takes at most "
        f"{most} at once; split it",
        param="n",
    )
