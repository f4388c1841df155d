"""Events of one request become deltas of its choices, for a stream and for a whole answer alike."""

import functools
from collections.abc import Sequence

from nanogpt.api.choice import ChoiceText, Delta, TokenText, add_entry
from nanogpt.api.errors import given_up
from nanogpt.api.objects import Logprobs, PromptTokensDetails, Usage
from nanogpt.api.plan import Plan
from nanogpt.api.tokens import token_text
from nanogpt.detokenizer import IncrementalDetokenizer
from nanogpt.errors import ServerError
from nanogpt.request import EngineEvent, PromptScored, TokenEvent, TokenLogprobs
from nanogpt.tokenizer import Tokenizer


class _Prompt:
    """What echo puts in front of each choice of a prompt."""

    def __init__(self, tokens: tuple[int, ...], text: str, *, scored: bool) -> None:
        self.tokens, self.text = tokens, text
        self.logprobs: list[TokenLogprobs] = []  # from the second token on
        self._scored = scored
        self._entries: Logprobs | None = None

    @property
    def complete(self) -> bool:
        return not self._scored or len(self.logprobs) >= len(self.tokens) - 1

    def delta(self, index: int, tokenizer: Tokenizer, token_text: TokenText) -> Delta:
        """The prompt as the beginning of a choice. The entries are the same ones in all of its
        choices, and not to be changed.
        """
        if self._scored and self._entries is None:
            self._entries = self._make_entries(tokenizer, token_text)
        return Delta(index, self.text, self._entries, [], None)

    def _make_entries(self, tokenizer: Tokenizer, token_text: TokenText) -> Logprobs:
        entries = Logprobs()
        detokenizer = IncrementalDetokenizer(tokenizer)
        detokenizer.push(self.tokens)
        values = (None, *self.logprobs)
        for token, value, offset in zip(self.tokens, values, detokenizer.offsets, strict=True):
            add_entry(entries, token, value, min(offset, len(self.text)), token_text)
        return entries


class Assembler:
    """All choices of one request. Indices are those of the engines: prompt_i * generated + j."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        request, completion = plan.request, plan.completion
        self._tokenizer = tokenizer
        self._token_text = functools.partial(token_text, tokenizer)
        self._n = request.n
        with_logprobs = completion.logprobs is not None
        self._prompts = [
            _Prompt(tokens, text, scored=completion.echo and with_logprobs)
            for tokens, text in zip(request.prompts, plan.prompt_texts, strict=True)
        ]
        self.choices = [
            ChoiceText(
                index,
                tokenizer,
                completion.stops,
                keep_ids=completion.return_token_ids,
                token_text=self._token_text if with_logprobs else None,
                offset=len(plan.prompt_texts[index // self._n]),
            )
            for index in range(len(request.prompts) * self._n)
        ]
        self._to_echo = [completion.echo] * len(self.choices)
        self._open = len(self.choices)
        self._cached = [0] * len(request.prompts)
        self._prompt_tokens = plan.prompt_tokens

    @property
    def done(self) -> bool:
        return self._open == 0

    def feed(self, events: Sequence[EngineEvent]) -> tuple[list[Delta], list[int]]:
        """(what is new, choices to cancel because a stop string ended them).

        Raises ServerError when the engines gave the request up; Unavailable: for now only.
        """
        touched: dict[int, ChoiceText] = {}
        stopped: list[int] = []
        for event in events:
            if isinstance(event, TokenEvent):
                choice = self.choices[event.index]
                if choice.finish_reason is not None:
                    continue
                choice.push(event)
                touched[event.index] = choice
                if event.cached_tokens and event.index % self._n == 0:
                    self._cached[event.index // self._n] = event.cached_tokens
                if choice.finish_reason is not None:
                    self._open -= 1
                    if choice.stopped:
                        stopped.append(event.index)
            elif isinstance(event, PromptScored):
                self._score(event, touched)
            else:
                raise given_up(event)
        deltas = self._take(touched)
        if self.done and any(self._to_echo):
            raise ServerError("the engines did not score the prompt; this is not your fault")
        return deltas, stopped

    def _score(self, event: PromptScored, touched: dict[int, ChoiceText]) -> None:
        prompt = self._prompts[event.prompt_i]
        prompt.logprobs.extend(event.logprobs)
        if prompt.complete:
            first = event.prompt_i * self._n
            touched.update((i, self.choices[i]) for i in range(first, first + self._n))

    def _take(self, touched: dict[int, ChoiceText]) -> list[Delta]:
        deltas = []
        for index, choice in touched.items():
            if self._to_echo[index]:
                prompt = self._prompts[index // self._n]
                if not prompt.complete:
                    continue
                self._to_echo[index] = False
                deltas.append(prompt.delta(index, self._tokenizer, self._token_text))
            delta = choice.take()
            if delta is not None:
                deltas.append(delta)
        return deltas

    def usage(self) -> Usage:
        """Of all that was generated so far, also the choices that best_of leaves out."""
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached)),
        )

    def best(self, n: int) -> list[int]:
        """The n best choices of each prompt: by mean log probability a token, then by index."""
        if n == self._n:
            return list(range(len(self.choices)))
        chosen: list[int] = []
        for first in range(0, len(self.choices), self._n):
            each = range(first, first + self._n)
            chosen += sorted(each, key=lambda i: -self.choices[i].mean_logprob)[:n]
        return chosen
