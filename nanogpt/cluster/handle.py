"""An accepted request as the front end follows it."""

import queue
import threading
from collections.abc import Callable, Sequence

import msgspec

from nanogpt.cluster.intake import Place
from nanogpt.request import (
    EngineEvent,
    GenerateRequest,
    PromptScored,
    RequestFailed,
    TokenEvent,
)


class RequestHandle:
    """Events of one request for one HTTP thread, and what a new incarnation must know to go on.

    The I/O thread calls `deliver`; the thread that serves the client calls `events` and `cancel`.
    Every position of every choice is handed on exactly once, in order, whatever the ranks send:
    what was seen before is dropped, so a restart that repeats itself can't be noticed.
    """

    def __init__(
        self,
        request: GenerateRequest,
        place: Place,
        cancel: Callable[["RequestHandle", int | None], None],
        fingerprint: str = "",
        *,
        is_patient: bool = False,
    ) -> None:
        """`is_patient`: it waits for its model as long as that takes."""
        count = len(request.prompts) * request.n
        self.request = request
        self.place = place
        self.is_patient = is_patient
        self.fingerprint = fingerprint  # of the weights that it is for
        self._cancel = cancel
        self._hand_over = threading.Lock()
        self._sink: Callable[[list[EngineEvent]], None] | None = None
        self._queue: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
        self._generated = [list(tokens) for tokens in request.resumed] or [[] for _ in range(count)]
        self._scored = [0] * len(request.prompts)  # prompt log probabilities seen
        self.finished = set(request.finished)  # also cancelled choices
        self.blame = 0  # for groups that died with it, since its latest token

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def owners(self) -> tuple[int, ...]:
        """Rank of each choice."""
        return self.place.owners

    @property
    def has_begun(self) -> bool:
        """Whether anything of it was generated."""
        return any(self._generated) or any(self._scored)

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self._generated)

    # The serving thread

    def events(self, timeout: float) -> list[EngineEvent]:
        """New events, after waiting up to `timeout` seconds for some; empty when none came."""
        events: list[EngineEvent] = []
        try:
            events = self._queue.get(timeout=timeout)
            while not self._queue.empty():
                events = events + self._queue.get_nowait()
        except queue.Empty:
            pass  # timeout 0 or nothing came: an empty list says so
        return events

    def send_to(self, sink: Callable[[list[EngineEvent]], None]) -> None:
        """From now on events go there, in the I/O thread, instead of to `events`; those that wait
        go first, in this thread. `sink` must not wait for anything."""
        with self._hand_over:
            if waiting := self.events(0):
                sink(waiting)
            self._sink = sink

    def cancel(self, index: int | None = None) -> None:
        """Stop one choice, or all: no more events of it are needed. May be called again."""
        self._cancel(self, index)

    # The I/O thread

    def accept(self, event: EngineEvent) -> tuple[EngineEvent | None, Sequence[int]]:
        """(the event as far as it is new, or None; indices of choices that it finishes)."""
        if isinstance(event, TokenEvent):
            return self._accept_tokens(event)
        if isinstance(event, PromptScored):
            return self._accept_scored(event), ()
        open_choices = [i for i in range(len(self._generated)) if i not in self.finished]
        self.finished.update(open_choices)
        return event, open_choices

    def _accept_tokens(self, event: TokenEvent) -> tuple[TokenEvent | None, Sequence[int]]:
        if not 0 <= event.index < len(self._generated) or event.index in self.finished:
            return None, ()
        seen = self._generated[event.index]
        if event.position != len(seen):
            return None, ()
        seen.extend(event.token_ids)
        self.blame = 0
        if event.finish_reason is None:
            return event, ()
        self.finished.add(event.index)
        return event, (event.index,)

    def _accept_scored(self, event: PromptScored) -> PromptScored | None:
        if not 0 <= event.prompt_i < len(self._scored):
            return None
        new = event.beyond(self._scored[event.prompt_i])
        if new is not None:
            self._scored[event.prompt_i] += len(new.logprobs)
            self.blame = 0
        return new

    def deliver(self, events: list[EngineEvent]) -> None:
        with self._hand_over:
            if self._sink is None:
                self._queue.put(events)
            else:
                self._sink(events)

    def fail(self, message: str, code: str = "", retry_after: int = 0) -> Sequence[int]:
        """End the request as ours to answer for (see RequestFailed). Returns the choices that were
        still open."""
        event = RequestFailed(self.request_id, message, code, retry_after)
        _, finished = self.accept(event)
        self.deliver([event])
        return finished

    def remaining(self) -> GenerateRequest:
        """The request as the ranks get it: with its owners, and the tokens so far."""
        placed = msgspec.structs.replace(self.request, owners=self.owners)
        return placed.remaining(self._generated, self.finished, self._scored)
