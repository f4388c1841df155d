"""Events of a request in few pieces, for whoever has no client that waits for them.

A thread that wakes for each token of each line takes the interpreter from those that serve clients,
and the cores from the engines.
"""

import threading
import time
from collections.abc import Sequence

from nanogpt.api.backend import LiveHandle
from nanogpt.request import EngineEvent, TokenEvent


class Gathered:
    """See nanogpt.api.backend.Handle. Tokens are handed on each `interval_s`; what ends a choice,
    or the request, at once."""

    def __init__(self, handle: LiveHandle, interval_s: float) -> None:
        self._handle, self._interval_s = handle, interval_s
        self._lock = threading.Lock()
        self._events: list[EngineEvent] = []
        self._some = threading.Event()  # there are events
        self._urgent = threading.Event()  # that shall not wait
        self._next_at = 0.0
        handle.send_to(self._take)

    @property
    def owners(self) -> tuple[int, ...]:
        return self._handle.owners

    def _take(self, events: Sequence[EngineEvent]) -> None:
        """In whatever thread brings them."""
        with self._lock:
            self._events += events
            self._some.set()
            if any(map(_is_urgent, events)):
                self._urgent.set()

    def events(self, timeout: float) -> Sequence[EngineEvent]:
        started = time.monotonic()
        rest = min(timeout, max(0.0, self._next_at - started))
        if not self._urgent.wait(rest):
            self._some.wait(max(0.0, started + timeout - time.monotonic()))
        with self._lock:
            self._some.clear()
            self._urgent.clear()
            found, self._events = self._events, []
        self._next_at = time.monotonic() + self._interval_s
        return found

    def cancel(self, index: int | None = None) -> None:
        self._handle.cancel(index)


def _is_urgent(event: EngineEvent) -> bool:
    return not isinstance(event, TokenEvent) or event.finish_reason is not None
