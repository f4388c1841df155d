"""Requests as clients write them: types, ranges, and the rules between fields.

The structs are the single definition: they validate, and openapi.py makes the schema from them.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nanogpt.api.admission.subject import MAX_USER_CHARS
from nanogpt.api.decode import check_content_type, decode
from nanogpt.errors import InvalidRequest

MAX_PROMPTS = 2048  # in one request
MAX_CHOICES = 4096  # prompts * max(n, best_of): each holds text and state until the end
MAX_STOPS = 4
MAX_STOP_CHARS = 512  # a stream holds back up to this much text
MAX_LOGIT_BIAS = 1024
MAX_CONTEXTS = 16  # of prompt and completion past the context: work grows with the square
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

TokenId = Annotated[int, Meta(ge=0)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


MetadataKey = Annotated[str, Meta(max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)]
METADATA = (
    "an object of up to 16 strings of up to 512 characters, with names of up to 64; "
    "kept with what is stored"
)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = False


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/completions. null stands for the default of every field but model."""

    model: Annotated[
        str, Meta(min_length=1, max_length=512, description="a name from GET /v1/models")
    ]
    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(
            description="a string, a list of strings, a list of token ids, or a list of lists of "
            'token ids; "" or null for the start of a document',
        ),
    ] = ""
    max_tokens: Annotated[
        int,
        Meta(ge=0, le=INT64_MAX, description="an integer from 0: tokens to generate a choice"),
    ] = 16
    temperature: Annotated[float, Meta(ge=0, le=2, description="a number from 0 (greedy) to 2")] = (
        1.0
    )
    top_p: Annotated[
        float, Meta(ge=0, le=1, description="a number from 0 to 1: nucleus sampling")
    ] = 1.0
    n: Annotated[
        int, Meta(ge=1, le=128, description="an integer from 1 to 128: choices for each prompt")
    ] = 1
    best_of: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=128,
                description="an integer from n to 128: generate so many choices, return the n "
                "with the highest mean log probability of a token; not with stream",
            ),
        ]
        | None
    ) = None
    stream: Annotated[bool, Meta(description="true for server-sent events, or false")] = False
    stream_options: (
        Annotated[
            StreamOptions,
            Meta(description='{"include_usage": true or false}; only with stream'),
        ]
        | None
    ) = None
    logprobs: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=20,
                description="an integer from 0 to 20: log probabilities of each token and of "
                "this many of the likeliest",
            ),
        ]
        | None
    ) = None
    echo: Annotated[
        bool, Meta(description="true to get the prompt back in front of the text, or false")
    ] = False
    stop: (
        Annotated[
            StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)],
            Meta(
                description=f"a string, or a list of up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} "
                "characters each: where the text ends",
            ),
        ]
        | None
    ) = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2, description="a number from -2 to 2")] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2, description="a number from -2 to 2")] = (
        0.0
    )
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
        Meta(
            max_length=MAX_LOGIT_BIAS,
            description=f"an object of up to {MAX_LOGIT_BIAS} entries "
            '{"token id": a number from -100 to 100}',
        ),
    ] = {}
    seed: (
        Annotated[
            int,
            Meta(ge=INT64_MIN, le=INT64_MAX, description="a 64-bit integer, for equal answers"),
        ]
        | None
    ) = None
    suffix: Annotated[str, Meta(description="null: no model here supports insertion")] | None = None
    user: (
        Annotated[
            str,
            Meta(
                max_length=MAX_USER_CHARS,
                description=f"a string of up to {MAX_USER_CHARS} characters",
            ),
        ]
        | None
    ) = None
    top_k: Annotated[
        int,
        Meta(ge=-1, le=2**31 - 1, description="an integer: the likeliest to keep; 0 or -1: all"),
    ] = 0
    min_p: Annotated[
        float,
        Meta(ge=0, le=1, description="a number from 0 to 1: least probability, over the largest"),
    ] = 0.0
    repetition_penalty: Annotated[
        float, Meta(ge=0.01, le=100, description="a number from 0.01 to 100; 1: none")
    ] = 1.0
    min_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=INT64_MAX,
            description="an integer from 0 to max_tokens: no end token before so many",
        ),
    ] = 0
    ignore_eos: Annotated[bool, Meta(description="true to go on past the end token, or false")] = (
        False
    )
    past_context: (
        Annotated[
            Literal["stop", "crop"],
            Meta(
                description='"stop": a choice ends with the context, whatever max_tokens says; '
                f'"crop": it goes on from the last tokens, up to {MAX_CONTEXTS} contexts in all, '
                "each token at the price of a whole prompt; null: what does not fit is refused",
            ),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[
        list[TokenId],
        Meta(max_length=1024, description="a list of up to 1024 token ids that end a choice"),
    ] = []
    return_token_ids: Annotated[
        bool, Meta(description="true for token_ids and prompt_token_ids in choices, or false")
    ] = False
    priority: Annotated[
        int,
        Meta(
            ge=-(2**31),
            le=2**31 - 1,
            description="a 32-bit integer; a lower one runs earlier, below 0 with an admin key",
        ),
    ] = 0
    background: Annotated[
        bool, Meta(description="true to get a stored completion at once and poll it, or false")
    ] = False
    metadata: Annotated[Metadata, Meta(description=METADATA)] | None = None

    @property
    def generated(self) -> int:
        """Choices to generate for each prompt; n of them are returned."""
        return self.best_of or self.n

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /tokenize. GPT-2 adds no special tokens, so that field changes nothing."""

    prompt: Annotated[str, Meta(description="a string")]
    model: Annotated[str, Meta(description="a name from GET /v1/models")] | None = None
    add_special_tokens: Annotated[bool, Meta(description="true or false")] = True
    return_token_strs: Annotated[bool, Meta(description="true or false")] = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(description="a list of token ids")]
    model: Annotated[str, Meta(description="a name from GET /v1/models")] | None = None


def parse_completion(body: bytes, content_type: str | None) -> CompletionRequest:
    """Raises UnsupportedMediaType or InvalidRequest. Whatever needs the model is plan.py's."""
    check_content_type(content_type)
    request = decode(body, CompletionRequest)
    _check_unsupported(request)
    _check_counts(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "stream_options is only allowed with stream; set stream to true or leave it out",
            param="stream_options",
        )
    if request.min_tokens > request.max_tokens:
        raise InvalidRequest(
            f"min_tokens {request.min_tokens} is above max_tokens {request.max_tokens}; "
            "lower it, or raise max_tokens",
            param="min_tokens",
        )
    return request


class _Sender(msgspec.Struct):
    """Of any JSON object the one field that says whose it is."""

    user: Annotated[str, Meta(max_length=MAX_USER_CHARS)] | None = None


_SENDER = msgspec.json.Decoder(_Sender)


def user_of(body: bytes) -> str | None:
    """The `user` of a request that is wrong somewhere else; None when it can't be made out."""
    try:
        return _SENDER.decode(body).user
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _check_unsupported(request: CompletionRequest) -> None:
    if request.suffix is not None:
        raise InvalidRequest(
            "suffix is not supported: no model here was trained to insert text; leave it out",
            param="suffix",
        )
    if request.metadata is not None and not request.background:
        raise InvalidRequest(
            "metadata is only kept with background completions; set background to true, or leave "
            "metadata out",
            param="metadata",
        )


def _check_counts(request: CompletionRequest) -> None:
    if request.generated < request.n:
        raise InvalidRequest(
            f"best_of {request.best_of} is below n {request.n}; it must be at least n",
            param="best_of",
        )
    if request.stream and request.generated > request.n:
        raise InvalidRequest(
            "best_of can't be streamed: the best are known only at the end; "
            "leave out best_of or stream",
            param="best_of",
        )
    prompts = prompt_count(request)
    if prompts * request.generated > MAX_CHOICES:
        raise InvalidRequest(
            f"{prompts} prompts with {request.generated} choices each are "
            f"{prompts * request.generated} choices, at most {MAX_CHOICES} are allowed; "
            "split the request",
            param="n" if request.best_of is None else "best_of",
        )


def prompt_count(request: CompletionRequest) -> int:
    """Prompts in the request. Raises InvalidRequest for a list that is none of the four forms."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return 1
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return 1
    if not prompt or [] in prompt:
        raise InvalidRequest(
            'prompt: an empty list has no tokens; send "" for the start of a document',
            param="prompt",
        )
    if len(kinds) > 1:
        raise InvalidRequest(
            "prompt: a list must hold only strings, only token ids, or only lists of token ids",
            param="prompt",
        )
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt: {len(prompt)} prompts, at most {MAX_PROMPTS} are allowed in one request; "
            "split it",
            param="prompt",
        )
    return len(prompt)
