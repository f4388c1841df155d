"""Deltas of choices as OpenAI's objects: one completion, or the events of a stream."""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from nanogpt.api.assemble import Assembler
from nanogpt.api.choice import Delta
from nanogpt.api.objects import Choice, Completion, Logprobs, Usage
from nanogpt.api.plan import Plan

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
MAX_RANKS_SHOWN = 512  # choices in the header: proxies refuse headers beyond some kilobytes

_encode = msgspec.json.Encoder().encode


def encode(value: object) -> bytes:
    """JSON."""
    return _encode(value)


def event(value: object) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one data line holds it."""
    return b"data: " + _encode(value) + b"\n\n"


def ranks_header(owners: Sequence[int], chosen: Iterable[int]) -> str | None:
    """Value of x-nanogpt-ranks: which rank generates each choice, by its index in the answer.
    None when that is not known, or too long."""
    if not owners:
        return None
    ranks = [str(owners[index]) for index in chosen]
    return ",".join(ranks) if len(ranks) <= MAX_RANKS_SHOWN else None


def _envelope(plan: Plan, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
    return Completion(
        id=plan.request.request_id,
        object="text_completion",
        created=plan.created,
        model=plan.request.model,
        system_fingerprint=plan.fingerprint,
        choices=choices,
        usage=usage,
    )


class Collected:
    """A whole answer, grown from the same deltas that a stream would send."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        with_ids = plan.completion.return_token_ids
        with_logprobs = plan.completion.logprobs is not None
        n = plan.request.n
        self._texts: list[list[str]] = []
        self._choices: list[Choice] = []
        for index in range(len(plan.request.prompts) * n):
            self._texts.append([])
            self._choices.append(
                Choice(
                    index=index,
                    text="",
                    logprobs=Logprobs() if with_logprobs else None,
                    finish_reason=None,
                    token_ids=[] if with_ids else UNSET,
                    prompt_token_ids=list(plan.request.prompts[index // n]) if with_ids else UNSET,
                )
            )

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            choice = self._choices[delta.index]
            self._texts[delta.index].append(delta.text)
            if delta.finish_reason is not None:
                choice.finish_reason = delta.finish_reason
            if choice.token_ids is not UNSET:
                choice.token_ids += delta.token_ids
            if choice.logprobs is not None and delta.logprobs is not None:
                choice.logprobs.tokens += delta.logprobs.tokens
                choice.logprobs.token_logprobs += delta.logprobs.token_logprobs
                choice.logprobs.top_logprobs += delta.logprobs.top_logprobs
                choice.logprobs.text_offset += delta.logprobs.text_offset

    def completion(self, assembler: Assembler, chosen: Sequence[int]) -> Completion:
        """The answer with the `chosen` of the generated choices, numbered in that order."""
        choices = []
        for index, original in enumerate(chosen):
            choice = self._choices[original]
            choice.index = index
            choice.text = "".join(self._texts[original])
            choices.append(choice)
        return _envelope(self._plan, choices, assembler.usage())


class Stream:
    """Writes the chunks of one stream."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._with_usage = plan.completion.include_usage
        self._with_ids = plan.completion.return_token_ids
        self._begun: set[int] = set()  # choices whose prompt_token_ids were sent
        # One chunk is filled again and again: this runs for every token of every stream.
        self._choice = Choice(index=0, text="", logprobs=None, finish_reason=None)
        self._chunk = _envelope(plan, [self._choice], None if self._with_usage else UNSET)

    def chunks(self, deltas: Iterable[Delta]) -> bytes:
        """The events of these deltas, together: one write for all that came at once."""
        return b"".join(map(self._one, deltas))

    def _one(self, delta: Delta) -> bytes:
        choice = self._choice
        choice.index, choice.text = delta.index, delta.text
        choice.logprobs, choice.finish_reason = delta.logprobs, delta.finish_reason
        if self._with_ids:
            choice.token_ids = delta.token_ids
            choice.prompt_token_ids = UNSET
            if delta.index not in self._begun:
                self._begun.add(delta.index)
                prompt = self._plan.request.prompts[delta.index // self._plan.request.n]
                choice.prompt_token_ids = list(prompt)
        return event(self._chunk)

    def end(self, assembler: Assembler) -> bytes:
        """Usage when it was asked for, and the mark of the end."""
        if not self._with_usage:
            return DONE
        return event(_envelope(self._plan, [], assembler.usage())) + DONE
