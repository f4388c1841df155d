"""What the HTTP layer needs of the cluster, so that any object of this shape can serve it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nanogpt.registry import ModelInfo
from nanogpt.request import EngineEvent, EngineStats, GenerateRequest
from nanogpt.tokenizer import Tokenizer


class Status(Protocol):
    """The worker group at a glance."""

    @property
    def epoch(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def ready(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    @property
    def detail(self) -> str: ...


class ModelStatus(Protocol):
    """A model and its memory: see nanogpt/cluster/residency.py."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def bytes(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def used_at(self) -> float | None: ...
    @property
    def load_s(self) -> float: ...
    @property
    def loads(self) -> int: ...
    @property
    def failures(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def problem(self) -> str: ...


class Handle(Protocol):
    """An accepted request.

    Events of a choice come in order and each position exactly once, also across a restart of the
    ranks; a choice has one finish_reason unless it was cancelled; RequestFailed comes at most once.
    """

    @property
    def owners(self) -> tuple[int, ...]:
        """Rank of each generated choice."""

    def events(self, timeout: float) -> Sequence[EngineEvent]:
        """New events, after waiting up to `timeout` seconds for some; empty when none came."""

    def cancel(self, index: int | None = None) -> None:
        """Stop one choice, or all of them. May be called again."""


class LiveHandle(Handle, Protocol):
    """One whose events may be pushed."""

    def send_to(self, sink: Callable[[Sequence[EngineEvent]], None]) -> None:
        """From now on events go there instead, in any thread; `sink` must not wait."""


class Cluster(Protocol):
    """Thread-safe."""

    def models(self) -> Mapping[str, ModelInfo]:
        """Models that are served, by name, in memory or not; empty while starting."""

    def model_states(self) -> Mapping[str, ModelStatus]:
        """Which of them are in memory, as far as that is known here."""

    def tokenizer(self, model: str) -> Tokenizer: ...

    def ready(self) -> bool: ...

    def status(self) -> Status: ...

    def stats(self) -> Mapping[int, Sequence[EngineStats]]:
        """The latest of each rank, one entry for each of its models."""

    def submit(
        self, request: GenerateRequest, *, is_patient: bool = False, may_block: bool = True
    ) -> LiveHandle:
        """Accept a request without owners; a patient one waits for its model as long as that
        takes. During a reload this waits if it may. Raises Unavailable; InvalidRequest: too many
        choices."""

    def drain(self) -> None:
        """Take no new requests. Safe to call from a signal handler."""

    def close(self) -> None: ...


class Residents(Protocol):
    """A cluster whose models come and go. Thread-safe; the orders return at once, and raise
    ModelNotFound; Conflict when they can't be carried out; Unavailable."""

    def models(self) -> Mapping[str, ModelInfo]: ...

    def model_states(self) -> Mapping[str, ModelStatus]: ...

    def memory(self) -> tuple[int, int]:
        """Bytes on each rank that models take, and that they may (0: there is no limit)."""

    def load(self, model: str) -> None: ...

    def unload(self, model: str) -> None: ...

    def pin(self, model: str) -> None: ...

    def unpin(self, model: str) -> None: ...
