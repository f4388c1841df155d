"""Answers as clients read them. openapi.py makes their schemas from these structs."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from nanogpt.request import FinishReason


class Logprobs(msgspec.Struct):
    """Four parallel arrays, one entry a token; text_offset counts code points from the prompt's
    start when it is echoed, and from the start of the prompt that was sent when it is not."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | UnsetType = UNSET  # with return_token_ids
    prompt_token_ids: list[int] | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(msgspec.Struct):
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct):
    error: ErrorDetail


ModelState = Literal["loaded", "loading", "unloading", "available", "not_available"]


class Model(msgspec.Struct):
    """A model that is served, or that could be; `command` brings the weights of one that is not
    available, and `created` is 0 for it. One that is served and not loaded is loaded by the first
    request for it."""

    id: str
    created: int
    context_length: int
    dtype: str
    num_parameters: int
    system_fingerprint: str | None
    object: Literal["model"] = "model"
    owned_by: str = "nanogpt"
    state: ModelState = "loaded"
    aliases: list[str] = []
    licence: str | None = None
    notes: str | None = None
    command: str | None = None


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class TokenizeResponse(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None = None


class Health(msgspec.Struct):
    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct):
    ready: bool
    draining: bool
    epoch: int
    ranks: int
    detail: str
    models: list[str]
