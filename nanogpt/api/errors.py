"""Anything that goes wrong as the JSON that OpenAI's clients read."""

import logging

import msgspec

from nanogpt.errors import (
    ApiError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    ServerError,
    Unavailable,
    UnsupportedMediaType,
)
from nanogpt.request import RequestFailed

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The client closed the connection before the answer was complete: there is no one to tell."""


def body(error: ApiError) -> bytes:
    """The JSON body of an error answer, or of the error event of a stream."""
    return _encode(error.body())


def unexpected(error: Exception) -> ApiError:
    """Log an error that is ours, and give the answer that says nothing of its inside."""
    log.error("unexpected error", exc_info=error)
    return ServerError("the server failed to answer this request; this is not your fault")


def given_up(event: RequestFailed) -> ApiError:
    """The error of a request that the cluster has given up."""
    if event.retry_after:
        return Unavailable(event.message, code=event.code, retry_after=event.retry_after)
    message = f"the request could not be completed: {event.message}"
    return ServerError(message, code=event.code or None)


def from_status(
    status: int, description: str, *, method: str = "", path: str = "", allowed: str = ""
) -> ApiError:
    """An error of the HTTP layer itself (routing, body size, malformed requests)."""
    if status == 404:
        return NotFound(f"there is no {path[:200]}; GET /docs lists what there is")
    if status == 405:
        headers = {"Allow": allowed} if allowed else {}
        return MethodNotAllowed(
            f"{method[:20]} is not allowed for {path[:200]}; allowed: {allowed}", headers=headers
        )
    if status == 413:
        return PayloadTooLarge(description)
    if status == 415:
        return UnsupportedMediaType(description)
    error: ApiError = InvalidRequest(description) if status < 500 else ServerError(description)
    error.status = status
    return error
