"""The routes of operators for models: which are in memory, loading, unloading and pinning them."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from nanogpt.api import catalogue
from nanogpt.api.answer import Answer
from nanogpt.api.backend import ModelStatus, Residents
from nanogpt.api.decode import decode
from nanogpt.api.objects import ModelState
from nanogpt.api.plan import find_model, real_name
from nanogpt.api.response import encode
from nanogpt.registry import ModelCard

log = logging.getLogger(__name__)

Command = Literal["load", "unload", "pin", "unpin"]


class NoBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of an order that takes none; may be left out."""


class Resident(msgspec.Struct):
    """A model and its memory. `memory_bytes`, of weights and KV on each rank, are what it takes
    while it is loaded; `waiting` are requests that wait for it, and `last_used` is when a request
    began or ended, in seconds since the epoch."""

    id: str
    state: ModelState
    pinned: bool
    memory_bytes: int
    running: int
    waiting: int
    last_used: int | None
    load_seconds: float | None
    loads: int
    failures: int
    evictions: int
    problem: str | None


class ResidentList(msgspec.Struct):
    """`memory_bytes` are those of all models that are loaded, on each rank."""

    data: list[Resident]
    memory_bytes: int
    memory_limit_bytes: int | None
    object: Literal["list"] = "list"


class ResidentRoutes:
    """Thread-safe."""

    def __init__(
        self,
        cluster: Residents,
        cards: Mapping[str, ModelCard],
        clock: Callable[[], float],
    ) -> None:
        self._cluster, self._cards, self._clock = cluster, cards, clock

    def listed(self) -> Answer:
        used, limit = self._cluster.memory()
        states = self._cluster.model_states()
        rows = [self._resident(states[name]) for name in sorted(states)]
        return Answer(encode(ResidentList(rows, used, limit or None)))

    def order(self, command: Command, name: str, body: bytes, by: str) -> Answer:
        """`by` is the name of the operator's key. Raises ModelNotFound; Conflict."""
        decode(body or b"{}", NoBody)
        models = self._cluster.models()
        info = find_model(models, real_name(models, name, self._cards), self._cards)
        log.info("%s %s, by %s", command, info.name, by)
        getattr(self._cluster, command)(info.name)
        return Answer(encode(self._resident(self._cluster.model_states()[info.name])))

    def _resident(self, status: ModelStatus) -> Resident:
        used_at = status.used_at
        ago = None if used_at is None else time.monotonic() - used_at
        return Resident(
            id=status.name,
            state=catalogue.STATES[status.state],
            pinned=status.pinned,
            memory_bytes=status.bytes,
            running=status.running,
            waiting=status.waiting,
            last_used=None if ago is None else int(self._clock() - ago),
            load_seconds=status.load_s or None,
            loads=status.loads,
            failures=status.failures,
            evictions=status.evictions,
            problem=status.problem or None,
        )
