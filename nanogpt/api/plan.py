"""From a valid request to work for the engines: tokens, the model's limits, sampling parameters."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from nanogpt.api.catalogue import not_served, system_fingerprint
from nanogpt.api.decode import clip
from nanogpt.api.protocol import MAX_CONTEXTS, CompletionRequest
from nanogpt.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, Unavailable
from nanogpt.registry import ModelCard, ModelInfo, aliases, find_card
from nanogpt.request import GenerateRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.tokenizer import Tokenizer

# In one answer. An entry is some 24 bytes of JSON, and twice that of memory until it is sent; the
# longest list of prompts (MAX_PROMPTS) over a context of 1024, with logprobs 1, has just so many.
MAX_LOGPROBS = 2**22
MAX_ECHOED_CHARS = 2**26

GATHER_S = 0.25  # how long tokens may be on their way that nobody reads one by one


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted request: what the engines get, and what the answer is made from."""

    request: GenerateRequest
    completion: CompletionRequest
    prompt_texts: tuple[str, ...]  # what echo gives back, and where text offsets begin
    fingerprint: str
    created: int  # seconds since the epoch

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.request.prompts))


def real_name(models: Mapping[str, ModelInfo], name: str, cards: Mapping[str, ModelCard]) -> str:
    """The model's name behind an alias. Raises Unavailable while there are no models yet."""
    if not models:
        raise Unavailable(
            "the model is being loaded; try again soon", code="starting", retry_after=2
        )
    return name if name in models else aliases(models, cards).get(name, name)


def find_model(
    models: Mapping[str, ModelInfo], name: str, cards: Mapping[str, ModelCard] | None = None
) -> ModelInfo:
    """Raises ModelNotFound, which says of a model with a card how to get it."""
    info = models.get(name)
    if info is None:
        card = find_card(name, cards or {})
        what = "does not exist" if card is None else not_served(card)
        raise ModelNotFound(
            f"the model {clip(name)!r} {what}; there are: {clip(', '.join(sorted(models)), 1000)}",
            param="model",
        )
    return info


def make_plan(
    request: CompletionRequest,
    info: ModelInfo,
    tokenizer: Tokenizer,
    *,
    tenant: str = "",
    weight: float = 1.0,
    clock: Callable[[], float] = time.time,
) -> Plan:
    """Raises InvalidRequest; ContextLengthExceeded when prompt and max_tokens don't fit.

    `tenant` and `weight`: whose fair share of the engines it counts for, and how large that is.
    """
    check_ids(request.logit_bias, info, "logit_bias")
    check_ids(request.stop_token_ids, info, "stop_token_ids")
    _check_some_token_left(request, info)
    texts, prompts = _prompts(request, info, tokenizer)
    for prompt in prompts:
        _check_length(len(prompt), request, info)
    max_tokens = request.max_tokens
    if request.past_context == "stop":
        max_tokens = min(max_tokens, info.context_length - min(map(len, prompts)))
    _check_answer_size(request, texts, prompts, max_tokens)
    generate = GenerateRequest(
        request_id=f"cmpl-{secrets.token_hex(16)}",
        model=info.name,
        prompts=prompts,
        n=request.generated,
        params=_sampling_params(request, max_tokens),
        priority=request.priority,
        tenant=tenant,
        weight=weight,
        # Somebody waits for it: what comes after a stop string is computed in vain.
        gather_s=0.0 if request.stream or request.stops else GATHER_S,
    )
    return Plan(
        request=generate,
        completion=request,
        prompt_texts=texts,
        fingerprint=system_fingerprint(info),
        created=int(clock()),
    )


def _check_some_token_left(request: CompletionRequest, info: ModelInfo) -> None:
    """min_tokens bars the stop tokens: that must not be all there are."""
    barred = {*request.stop_token_ids, info.eos_token_id} - {None}
    if request.min_tokens and len(barred) == info.vocab_size:
        raise InvalidRequest(
            "stop_token_ids names every token of the model, so min_tokens leaves none to generate; "
            "name fewer, or leave min_tokens out",
            param="stop_token_ids",
        )


def _sampling_params(request: CompletionRequest, max_tokens: int) -> SamplingParams:
    ranked = request.generated > request.n  # best_of chooses by log probability
    return SamplingParams(
        # Drawn here, so that a restart of the engines goes on with the same random numbers.
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
        logprobs=0 if request.logprobs is None and ranked else request.logprobs,
        prompt_logprobs=_scores_prompt(request),
        crop=request.past_context == "crop",
    )


def _prompts(
    request: CompletionRequest, info: ModelInfo, tokenizer: Tokenizer
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """(what echo gives back, tokens) of each prompt."""
    prompt = request.prompt
    each: Sequence[str | Sequence[int]]
    if isinstance(prompt, str):
        each = [prompt]
    elif isinstance(prompt[0], int):
        each = [prompt]  # type: ignore[list-item]  # prompt_count has checked that all are ints
    else:
        each = prompt  # type: ignore[assignment]
    texts, tokens = [], []
    for one in each:
        if isinstance(one, str):
            texts.append(one)
            tokens.append(tuple(encode_prompt(one, info, tokenizer, _most_tokens(request, info))))
        else:
            _check_length(len(one), request, info)
            check_ids(one, info, "prompt")
            texts.append(tokenizer.decode(one))
            tokens.append(tuple(one))
    return tuple(texts), tuple(tokens)


def _scores_prompt(request: CompletionRequest) -> bool:
    return request.echo and request.logprobs is not None


def _most_tokens(request: CompletionRequest, info: ModelInfo) -> int:
    """Of prompt and completion together."""
    return info.context_length * (MAX_CONTEXTS if request.past_context == "crop" else 1)


def encode_prompt(
    text: str, info: ModelInfo, tokenizer: Tokenizer, most_tokens: int = 0
) -> Sequence[int]:
    """Tokens of a prompt; the start token for an empty one. Raises InvalidRequest, also for a text
    that can't be fewer than `most_tokens`, a context if 0."""
    if not text:
        return (info.start_token_id,)
    size = len(text.encode())
    most_tokens = most_tokens or info.context_length
    if size > tokenizer.max_token_bytes * most_tokens:  # refused without tokenising it
        raise ContextLengthExceeded(
            f"this model's context is {info.context_length} tokens; a prompt of {size} bytes "
            "can't fit; shorten the prompt",
            param="prompt",
        )
    return tokenizer.encode(text)


def _check_length(prompt_tokens: int, request: CompletionRequest, info: ModelInfo) -> None:
    most, max_tokens = _most_tokens(request, info), request.max_tokens
    total = prompt_tokens + max_tokens
    if _scores_prompt(request) and prompt_tokens > info.context_length:
        most = info.context_length  # log probabilities of a prompt are those within one context
    elif request.past_context == "stop":
        total = prompt_tokens
    if total <= most:
        return
    too_long = prompt_tokens > most
    allowed = f", and {most} are allowed" if most > info.context_length else ""
    raise ContextLengthExceeded(
        f"this model's context is {info.context_length} tokens{allowed}; you asked for {total} "
        f"({prompt_tokens} in the prompt, {max_tokens} in the completion); "
        f"{'shorten the prompt' if too_long else 'shorten the prompt or lower max_tokens'}",
        param="prompt" if too_long else "max_tokens",
    )


def _check_answer_size(
    request: CompletionRequest,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
) -> None:
    """Before any work is done: a small request could have an answer of gigabytes."""
    echoed = request.generated * sum(map(len, texts)) if request.echo else 0
    if echoed > MAX_ECHOED_CHARS:
        raise InvalidRequest(
            f"{len(texts)} prompts with {request.generated} choices each would bring {echoed} "
            f"characters of prompts back, at most {MAX_ECHOED_CHARS} are allowed in one answer; "
            "leave out echo, lower n, or split the request",
            param="echo",
        )
    if request.logprobs is None:
        return
    tokens = sum(max_tokens + request.echo * len(prompt) for prompt in prompts)
    entries = request.generated * tokens * (request.logprobs + 1)
    if entries > MAX_LOGPROBS:
        raise InvalidRequest(
            f"{len(prompts)} prompts with {request.generated} choices each may bring {entries} log "
            f"probabilities, at most {MAX_LOGPROBS} are allowed in one answer; lower logprobs, n "
            "or max_tokens, or split the request",
            param="logprobs",
        )


def check_ids(ids: Iterable[int], info: ModelInfo, param: str) -> None:
    highest = max(ids, default=0)
    if highest >= info.vocab_size:
        raise InvalidRequest(
            f"{param}: token id {clip(str(highest), 40)} is outside the vocabulary of "
            f"{info.name}; ids go from 0 to {info.vocab_size - 1}",
            param=param,
        )
