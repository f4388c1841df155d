"""Following one accepted request to its end, for a client that may leave before."""

import time
from collections.abc import Callable, Iterator, Sequence

from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Handle
from nanogpt.api.choice import Delta
from nanogpt.api.errors import ClientGone
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import Plan
from nanogpt.errors import Unavailable
from nanogpt.request import EngineEvent, TokenEvent

QUEUE_RETRY_S = 30  # when to come back after a wait in vain
POLL_S = 1.0  # how often an idle exchange looks after its client, and pings it


class Exchange:
    """One request while it is answered. Used by one thread at a time, but that a stream's thread
    may look around while the one that writes streams advances it.

    Whatever ends it (the last token, an error, a client that left, a generator that is closed),
    `close` is called, and what still runs is cancelled.
    """

    def __init__(
        self,
        plan: Plan,
        handle: Handle,
        assembler: Assembler,
        metrics: Metrics,
        *,
        started: float,
        is_client_gone: Callable[[], bool],
        must_end: Callable[[], bool],
        on_close: Callable[[int, int], None],
        queue_timeout_s: float,
    ) -> None:
        """`started`: time.monotonic() when the request came; `must_end`: no more patience;
        `on_close` gets the tokens that count as used: of the prompts, and generated.
        """
        self.plan, self.handle, self.assembler = plan, handle, assembler
        self._is_client_gone, self._must_end = is_client_gone, must_end
        self._metrics = metrics
        self._started = started
        self._look_at = 0.0
        self._queue_timeout_s = queue_timeout_s
        self._begun = False  # the engines have sent something
        self._is_served = True  # False: an error of ours ended it
        self._last: dict[int, float] = {}  # when each choice had its latest tokens
        self.first_token_s: float | None = None
        model = plan.request.model
        metrics.in_progress.inc()
        metrics.prompt_tokens.labels(model).inc(plan.prompt_tokens)
        self._tokens = metrics.completion_tokens.labels(model)
        self._between = metrics.between_tokens.labels(model)
        self._on_close = on_close
        self._closed = False

    def deltas(self) -> Iterator[list[Delta] | None]:
        """What is new, until all choices are finished; None after a second without events.

        Raises ClientGone, ServerError when the engines gave up, Unavailable when it waited too
        long for its first token, or when the server must end before the request does.
        """
        while not self.assembler.done:
            self.look_around()
            events = self.handle.events(self.patience())
            yield self.advance(events) if events else None

    def advance(self, events: Sequence[EngineEvent]) -> list[Delta]:
        """What these events bring. Raises ServerError when the engines gave up."""
        self._begun = True
        self._measure(events)
        deltas, stopped = self._feed(events)
        for index in stopped:
            self.handle.cancel(index)
        return deltas

    def _feed(self, events: Sequence[EngineEvent]) -> tuple[list[Delta], list[int]]:
        try:
            return self.assembler.feed(events)
        except Exception:
            self._is_served = False
            raise

    def patience(self) -> float:
        """Seconds to wait for events, up to `POLL_S`. Raises Unavailable when none ever came."""
        if self._begun:
            return POLL_S
        left = self._started + self._queue_timeout_s - time.monotonic()
        if left <= 0:
            self._is_served = False
            raise Unavailable(
                f"the request waited {self._queue_timeout_s:g} s in the queue without getting its "
                "turn; try again later, when the server is less busy",
                retry_after=QUEUE_RETRY_S,
            )
        return min(POLL_S, left)

    def look_around(self) -> None:
        """Each second, not each token: with hundreds of threads a system call costs a turn.
        Raises ClientGone, Unavailable."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + POLL_S
        if self._is_client_gone():
            raise ClientGone
        if self._must_end():
            self._is_served = False
            raise Unavailable(
                "the server shut down before this request was complete; send it again",
                code="draining",
            )

    def _measure(self, events: Sequence[EngineEvent]) -> None:
        now = time.monotonic()
        for event in events:
            if not isinstance(event, TokenEvent) or not event.token_ids:
                continue
            count = len(event.token_ids)
            self._tokens.inc(count)
            before = self._last.get(event.index)
            self._last[event.index] = now
            if before is not None:
                self._between.observe((now - before) / count)
            elif self.first_token_s is None:
                self.first_token_s = now - self._started
                model = self.plan.request.model
                self._metrics.first_token.labels(model).observe(self.first_token_s)

    def close(self) -> None:
        """Cancel what still runs, and count what happened. May be called again."""
        if self._closed:
            return
        self._closed = True
        model = self.plan.request.model
        self._on_close(*self._used())
        self._metrics.in_progress.dec()
        if not self.assembler.done:
            self.handle.cancel()
            self._metrics.cancelled.labels(model).inc()
        self._metrics.duration.labels(model).observe(time.monotonic() - self._started)
        for choice in self.assembler.choices:
            self._metrics.choices.labels(model, choice.finish_reason or "cancelled").inc()

    def _used(self) -> tuple[int, int]:
        """What the client pays for: nothing when our error came before its first token. One that
        left meanwhile pays for its prompts, or leaving would make work for nothing.
        """
        usage = self.assembler.usage()
        free = not self._is_served and not usage.completion_tokens
        return (0 if free else usage.prompt_tokens), usage.completion_tokens

    def summary(self) -> str:
        """For the log: who did what."""
        usage = self.assembler.usage()
        reasons = [choice.finish_reason or "cancelled" for choice in self.assembler.choices]
        counts = ",".join(f"{r}:{reasons.count(r)}" for r in sorted(set(reasons)))
        first = "-" if self.first_token_s is None else f"{self.first_token_s * 1000:.0f}"
        ranks = ",".join(map(str, self.handle.owners[:64]))
        return (
            f"id={self.plan.request.request_id} model={self.plan.request.model} "
            f"prompt={usage.prompt_tokens} cached={usage.prompt_tokens_details.cached_tokens} "
            f"completion={usage.completion_tokens} finish={counts} ttft_ms={first} ranks={ranks}"
        )
