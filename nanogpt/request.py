"""What travels between front end and engines: a request going in, token events coming out."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import msgspec

from nanogpt.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted completion request: every prompt with its n choices, and who runs which.

    Choices are numbered as in the API: index = prompt_i * n + choice_j. `owners[index]` is the
    rank that generates the choice; a rank ignores the others. `resumed[index]` are tokens that an
    earlier incarnation already generated for the choice: they count as generated, and generation
    goes on at position len(resumed[index]). `finished` are indices that need no more work.

    Under contention tenants of one priority get equal service on each rank, or service in
    proportion to `weight` (0.001 to 1000). `tenant` is an opaque name; "" is one like any other.

    Who doesn't read token by token says in `gather_s` for how many seconds tokens may be kept back
    while the choice runs, so that they come in few events. The first token and the end of a choice
    are told at once anyway, and tokens with log probabilities are never kept back.
    """

    request_id: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    params: SamplingParams
    owners: tuple[int, ...] = ()  # filled at placement
    resumed: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()
    priority: int = 0  # lower runs first
    tenant: str = ""  # whom the scheduler treats fairly: an API key and its end user
    weight: float = 1.0  # the tenant's share, relative to those of others
    gather_s: float = 0.0

    def remaining(
        self,
        tokens: Sequence[Sequence[int]],
        finished: Collection[int],
        scored: Sequence[int],
    ) -> "GenerateRequest":
        """What is left to do, with the tokens so far of every choice, the indices that need no more
        work, and how many log probabilities of each prompt are known."""
        changes: dict[str, Any] = {"finished": tuple(sorted(finished))}
        if any(tokens):
            changes["resumed"] = tuple(map(tuple, tokens))
        known = zip(scored, self.prompts, strict=True)
        if self.params.prompt_logprobs and all(n >= len(prompt) - 1 for n, prompt in known):
            changes["params"] = msgspec.structs.replace(self.params, prompt_logprobs=False)
        return msgspec.structs.replace(self, **changes)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities at one position (natural logarithm, finite, -9999.0 at the least).

    `logprob` is the token's own; `top_ids` and `top_logprobs` are parallel, likeliest first.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one choice. `position` is the first token's, counted from 0 in the output.

    An end token or stop token is not among `token_ids`: it shows as finish_reason "stop" only.
    `logprobs` is parallel to `token_ids` when the request asked for them, else empty. With an
    `end_token_id`, the end or stop token that finished the choice, it has one entry more: that
    token's. Clients that score text (echo, max_tokens 1) rely on a value for every sampled token.
    """

    request_id: str
    index: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # of the prompt, found in the prefix cache; in the first event only
    end_token_id: int | None = None  # with finish_reason "stop" and logprobs


class PromptScored(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities of prompt `prompt_i`'s tokens from its second on (echo with logprobs).

    Sent by the owner of the prompt's first choice before that choice's first TokenEvent, in as
    many parts as it likes; `position` is the prompt position of the first entry.
    """

    request_id: str
    prompt_i: int
    position: int
    logprobs: tuple[TokenLogprobs, ...]

    def beyond(self, scored: int) -> "PromptScored | None":
        """What is new when so many values of the prompt are known: a resumed prompt is scored from
        its start. None when nothing is, or something in between is missing."""
        # Positions count from the prompt's second token, which is the first that has a value.
        known = scored + 1 - self.position
        if known < 0 or known >= len(self.logprobs):
            return None
        if known == 0:
            return self
        return msgspec.structs.replace(
            self, position=self.position + known, logprobs=self.logprobs[known:]
        )


class RequestFailed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The request is given up: ours to fix, never the client's fault. With `retry_after` (seconds)
    another attempt may well succeed; `code` is that of the error which the client gets."""

    request_id: str
    message: str
    code: str = ""
    retry_after: int = 0


EngineEvent = TokenEvent | PromptScored | RequestFailed


class EngineStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Counters and gauges of one model on one rank."""

    model: str
    waiting: int = 0
    running: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0  # for want of blocks
    steps: int = 0
    fair_preemptions: int = 0  # in favour of another tenant or a lower priority value
