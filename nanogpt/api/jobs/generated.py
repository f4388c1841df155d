"""What the engines have generated of a request so far: kept in a job's records, and not yet."""

from collections.abc import Collection, Sequence

import msgspec

from nanogpt.api.jobs import outcome
from nanogpt.api.jobs.outcome import Progress
from nanogpt.jobs.runner import Lease
from nanogpt.jobs.store import StoreUnavailable
from nanogpt.request import EngineEvent, GenerateRequest, PromptScored, RequestFailed, TokenEvent


class Generated:
    """Of one request. `records` are those of its job; without any, `mark` becomes the job's state
    together with the first one: it says what generates them."""

    def __init__(
        self, request: GenerateRequest, records: Sequence[bytes] = (), mark: bytes | None = None
    ) -> None:
        self._request = request
        self.mark = None if records else mark  # while it is not kept yet
        self._tokens: list[list[int]] = [[] for _ in range(len(request.prompts) * request.n)]
        self._finished: set[int] = set()
        self._scored = [0] * len(request.prompts)
        self._fresh: list[EngineEvent] = []
        for record in records:
            self._count(outcome.progress(record).events)

    def _count(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self._tokens[event.index].extend(event.token_ids)
                if event.finish_reason is not None:
                    self._finished.add(event.index)
            elif isinstance(event, PromptScored):
                self._scored[event.prompt_i] += len(event.logprobs)

    @property
    def has_any(self) -> bool:
        return any(self._tokens)

    def finished(self) -> Collection[int]:
        """Choices that need no more work."""
        return sorted(self._finished)

    @property
    def done(self) -> bool:
        """Whether every choice has come to its own end."""
        return len(self._finished) == len(self._tokens)

    def accept(self, events: Sequence[EngineEvent]) -> list[EngineEvent]:
        """The events as far as they are new: a resumed prompt is scored from its start."""
        new = [kept for event in events if (kept := self._unknown(event)) is not None]
        self._fresh += [event for event in new if not isinstance(event, RequestFailed)]
        self._count(new)
        return new

    def _unknown(self, event: EngineEvent) -> EngineEvent | None:
        if isinstance(event, PromptScored):
            return event.beyond(self._scored[event.prompt_i])
        return event

    @property
    def has_unkept(self) -> bool:
        return bool(self._fresh)

    def unkept(self) -> list[bytes]:
        """What is not kept yet, as one record; or none."""
        return [outcome.encode(Progress.of(self._fresh))] if self._fresh else []

    def keep(self, lease: Lease) -> bool:
        """Have it kept; False when the store is not there now. Raises LeaseLost."""
        try:
            lease.append(self.unkept(), self.mark)
        except StoreUnavailable:
            return False
        self._fresh, self.mark = [], None
        return True

    def remaining(self, fence: int) -> GenerateRequest:
        """What the engines still have to do."""
        left = self._request.remaining(self._tokens, self.finished(), self._scored)
        # Another attempt may still be ending: the engines must tell them apart.
        return msgspec.structs.replace(left, request_id=f"{left.request_id}.{fence}")
