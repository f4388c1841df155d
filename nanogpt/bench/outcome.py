"""One request as its client saw it."""

import itertools
from typing import Literal

import msgspec

CountedBy = Literal["usage", "chunks"]


class Outcome(msgspec.Struct, kw_only=True):
    """Times are seconds of time.perf_counter().

    `arrivals[choice]` are the times of the chunks that had text of that choice (or, for a choice
    without any text, of its end). `error` is empty when all went well; `status` is 0 when there was
    no HTTP answer. Output tokens are what the server's usage says, else the number of chunks.
    """

    started: float
    ended: float = 0.0
    status: int = 0
    error: str = ""
    arrivals: dict[int, list[float]] = {}
    n: int = 1
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted_by: CountedBy = "usage"

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first text of any choice; None when it was not streamed."""
        firsts = [times[0] for times in self.arrivals.values()]
        return min(firsts) - self.started if firsts else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each output token of a choice after its first."""
        tokens = self.output_tokens / self.n
        if not self.arrivals or tokens <= 1:
            return None
        first = min(times[0] for times in self.arrivals.values())
        last = max(times[-1] for times in self.arrivals.values())
        return (last - first) / (tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.ended - self.started

    def gaps_s(self) -> list[float]:
        """Between successive chunks of the same choice."""
        return [
            later - earlier
            for times in self.arrivals.values()
            for earlier, later in itertools.pairwise(times)
        ]


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Choice(msgspec.Struct):
    text: str = ""
    index: int = 0
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Completion(msgspec.Struct):
    """What we read of a completion, whole or one chunk; all else is skipped undecoded."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


_decode = msgspec.json.Decoder(_Completion).decode


class Recorder:
    """Fills an Outcome from the lines of an event stream, or from a whole body."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._chunks = 0
        self._counted = False
        self._done = False

    def line(self, line: bytes, now: float) -> None:
        """A line of the event stream that arrived at `now`."""
        if not line.startswith(b"data:"):
            return
        data = line[5:]
        if data.strip() == b"[DONE]":
            self._done = True
            return
        completion = self._completion(data)
        if completion is None:
            return
        arrivals = self._outcome.arrivals
        for choice in completion.choices:
            if choice.text:
                self._chunks += 1
                arrivals.setdefault(choice.index, []).append(now)
            elif choice.finish_reason and choice.index not in arrivals:
                arrivals[choice.index] = [now]

    def whole(self, body: bytes) -> None:
        """An answer that is not streamed."""
        self._done = True
        completion = self._completion(body)
        if completion is not None:
            self._chunks = len(completion.choices)

    def end(self) -> None:
        """The answer is complete."""
        if not self._done and not self._outcome.error:
            self._outcome.error = "the stream ended without [DONE]"
        if not self._counted:
            self._outcome.output_tokens, self._outcome.counted_by = self._chunks, "chunks"

    def _completion(self, data: bytes) -> _Completion | None:
        try:
            completion = _decode(data)
        except msgspec.MsgspecError as error:
            self._outcome.error = f"not a completion: {error}"
            return None
        if completion.error is not None:
            self._outcome.error = _text(completion.error) or "an error without a message"
        if completion.usage is not None:
            self._counted = True
            self._outcome.prompt_tokens = completion.usage.prompt_tokens
            self._outcome.output_tokens = completion.usage.completion_tokens
        return completion


def _text(error: _Error | str | None) -> str:
    return error if isinstance(error, str) else error.message if error else ""


def error_message(body: bytes) -> str:
    """The message of an error's body, or its beginning."""
    try:
        message = _text(_decode(body).error)
    except msgspec.MsgspecError:
        message = ""
    return message or body[:200].decode(errors="replace").strip() or "no message"
