"""One choice on its way from tokens to text: stop strings, log probabilities, counts.

What arrives is pushed, what may be shown is taken. Text that could be the beginning of a stop
string is held back by the detokenizer; a token's log probabilities wait until the text in which
the token begins is out, so that none of a stop string's own are ever shown.
"""

from collections.abc import Callable

import msgspec

from nanogpt.api.objects import Logprobs
from nanogpt.detokenizer import IncrementalDetokenizer
from nanogpt.request import FinishReason, TokenEvent, TokenLogprobs
from nanogpt.tokenizer import Tokenizer

TokenText = Callable[[int], str]


class Delta(msgspec.Struct):
    """What is new of a choice since the last time."""

    index: int
    text: str
    logprobs: Logprobs | None
    token_ids: list[int]
    finish_reason: FinishReason | None


def add_entry(
    into: Logprobs, token_id: int, values: TokenLogprobs | None, offset: int, token_text: TokenText
) -> None:
    """Append one token to the four arrays; without values (a first prompt token) they are null."""
    text = token_text(token_id)
    into.tokens.append(text)
    into.text_offset.append(offset)
    if values is None:
        into.token_logprobs.append(None)
        into.top_logprobs.append(None)
        return
    top = {token_text(i): p for i, p in zip(values.top_ids, values.top_logprobs, strict=True)}
    top[text] = values.logprob
    into.token_logprobs.append(values.logprob)
    into.top_logprobs.append(top)


class ChoiceText:
    """The completion of one choice, without its prompt."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        *,
        keep_ids: bool,
        token_text: TokenText | None,
        offset: int,
    ) -> None:
        """`token_text`: for log probabilities, None without; `offset`: code points in front."""
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.stopped = False  # by a stop string, so the engine still has to be told
        self._detokenizer = IncrementalDetokenizer(tokenizer, stops)
        self._keep_ids = keep_ids
        self._token_text = token_text
        self._offset = offset
        self._shown = 0  # code points handed to `take` or about to be
        self._text = ""
        self._token_ids: list[int] = []
        self._entries: list[tuple[int, TokenLogprobs]] = []  # of all tokens: (id, values)
        self._entries_taken = 0
        self._end_token: tuple[int, TokenLogprobs] | None = None
        self._sum_logprobs, self._num_logprobs = 0.0, 0

    @property
    def num_tokens(self) -> int:
        """Generated tokens, up to the one that completes a stop string."""
        return self._detokenizer.stop_token_count

    @property
    def mean_logprob(self) -> float:
        """For best_of; a choice without any counts as the worst."""
        return self._sum_logprobs / self._num_logprobs if self._num_logprobs else float("-inf")

    def push(self, event: TokenEvent) -> None:
        if self.finish_reason is not None:
            return  # tokens past a stop string
        before = self._detokenizer.stop_token_count
        self._show(self._detokenizer.push(event.token_ids))
        token_ids = event.token_ids[: self._detokenizer.stop_token_count - before]
        if self._keep_ids:
            self._token_ids.extend(token_ids)
        if event.logprobs:
            self._add_logprobs(token_ids, event.logprobs)
        if event.finish_reason is not None and not self._detokenizer.stopped:
            self._finish(event)
        elif self._detokenizer.stopped:
            self.finish_reason = "stop"
            self.stopped = event.finish_reason is None

    def _finish(self, event: TokenEvent) -> None:
        self._show(self._detokenizer.finish())
        self.finish_reason = "stop" if self._detokenizer.stopped else event.finish_reason
        if event.end_token_id is not None and len(event.logprobs) > len(event.token_ids):
            # The end token is no text, but it was sampled: it has its place among the others.
            self._end_token = (event.end_token_id, event.logprobs[-1])
            self._count_logprob(event.logprobs[-1])

    def _add_logprobs(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]
    ) -> None:
        for token_id, values in zip(token_ids, logprobs, strict=False):
            self._count_logprob(values)
            if self._token_text is not None:
                self._entries.append((token_id, values))

    def _count_logprob(self, values: TokenLogprobs) -> None:
        self._sum_logprobs += values.logprob
        self._num_logprobs += 1

    def _show(self, text: str) -> None:
        self._text += text
        self._shown += len(text)

    def take(self) -> Delta | None:
        """What may be shown and was not taken yet; None when there is nothing to say."""
        logprobs = self._take_logprobs()
        has_entries = logprobs is not None and logprobs.tokens
        if not (self._text or self._token_ids or self.finish_reason or has_entries):
            return None
        delta = Delta(self.index, self._text, logprobs, self._token_ids, self.finish_reason)
        self._text, self._token_ids = "", []
        return delta

    def _take_logprobs(self) -> Logprobs | None:
        if self._token_text is None:
            return None
        taken = Logprobs()
        offsets, kept = self._detokenizer.offsets, self._detokenizer.kept_token_count
        while self._entries_taken < kept:
            offset = offsets[self._entries_taken]
            if offset >= self._shown and self.finish_reason is None:
                break
            token_id, values = self._entries[self._entries_taken]
            add_entry(taken, token_id, values, self._offset + offset, self._token_text)
            self._entries_taken += 1
        if self._end_token is not None:
            add_entry(taken, *self._end_token, self._offset + self._shown, self._token_text)
            self._end_token = None
        return taken
