"""The loop of one rank: commands in, a step of each engine, events out."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from nanogpt.cluster.broadcast import Broadcast
from nanogpt.cluster.heart import Heart
from nanogpt.cluster.lead import Lead
from nanogpt.cluster.messages import (
    Command,
    Decoder,
    EventBatch,
    Frame,
    LoadModel,
    ModelAnswer,
    ModelFailed,
    ModelLoaded,
    ModelUnloaded,
    RankReady,
    Submit,
    UnloadModel,
    Welcome,
)
from nanogpt.cluster.respawn import Life
from nanogpt.cluster.transport import EventLink
from nanogpt.cluster.turns import Turns
from nanogpt.ranks import Ranks
from nanogpt.registry import ModelInfo
from nanogpt.request import EngineEvent, EngineStats, GenerateRequest, RequestFailed

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.001  # how late an idle rank may see a broadcast
IDLE_WAIT_MS = 200  # rank 0 wakes up when a message comes; this is for its other duties
STATS_S = 0.2  # how old the statistics in a beat may be while steps go on
MAX_BACKLOG = 1000  # event messages the front end has not taken: generate no more until it has


class Engine(Protocol):
    """What the loop needs of an engine."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def abort_all(self) -> None: ...
    def step(self) -> list[EngineEvent]: ...
    def stats(self) -> EngineStats: ...


class Arrival(Protocol):
    """The end of loading a model: an engine, or the reason why there is none."""

    @property
    def name(self) -> str: ...
    @property
    def engine(self) -> Engine | None: ...
    @property
    def problem(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class Loader(Protocol):
    """What makes engines, one at a time, and drops them."""

    @property
    def is_loading(self) -> bool: ...
    def begin(self, name: str) -> None: ...
    def finished(self, *, wait: bool = False) -> Arrival | None: ...
    def drop(self, engine: Any) -> None: ...


class RankLoop:
    """Owns this rank's engines and its link to the front end."""

    def __init__(
        self,
        ranks: Ranks,
        engines: Mapping[str, Engine],
        broadcast: Broadcast,
        lead: Lead | None,
        heartbeat_s: float,
        life: Life | None = None,
        loader: Loader | None = None,
    ) -> None:
        """`life` is what this rank's parent and it tell each other; without a `loader` the engines
        are always the same."""
        self._ranks, self._engines, self._broadcast = ranks, dict(engines), broadcast
        self._loader = loader
        self._turns = Turns()
        self._life = life or Life()
        self._lead, self._heartbeat_s = lead, heartbeat_s
        self._decode: Decoder[Frame] = Decoder(Frame)
        self._epoch = 0
        self._link: EventLink | None = None
        self._heart: Heart | None = None
        self._stats: tuple[EngineStats, ...] = ()
        self._stats_at = 0.0  # time.monotonic()

    def turn(self) -> None:
        """One tick. Waits a little when there is nothing to do."""
        busy = any(engine.has_work for engine in self._engines.values())
        if self._lead:
            waits = self._broadcast.pending or (self._loader and self._loader.is_loading)
            idle_ms = 1 if waits else IDLE_WAIT_MS
            self._lead.turn(0 if busy else idle_ms)
        payloads = self._broadcast.poll()
        for payload in payloads:
            for command in self._decode(payload).commands:
                self._apply(command)
        if self._loader and self._loader.is_loading:
            self._take_loaded(self._loader)
        if self._link and self._link.backlog:
            self._link.flush()
        if busy:
            self._step()
        elif not self._lead and not payloads:
            time.sleep(IDLE_POLL_S)
        self._life.turn()

    def _apply(self, command: Command) -> None:
        if isinstance(command, Welcome):
            self._enter(command)
        elif command.epoch != self._epoch:
            log.debug("dropped a command of epoch %d", command.epoch)
        elif isinstance(command, Submit):
            self._submit(command.request)
        elif isinstance(command, LoadModel):
            self._load(command.model)
        elif isinstance(command, UnloadModel):
            self._unload(command.model)
        else:
            for engine in self._engines.values():
                engine.abort(command.request_id, command.index)

    def _enter(self, welcome: Welcome) -> None:
        """A new epoch: nothing of the old one is wanted any more."""
        for engine in self._engines.values():
            engine.abort_all()
        if self._loader and self._loader.is_loading:  # it has to be told what there is
            self._take_loaded(self._loader, wait=True)
        if self._heart:
            self._heart.stop()
        if self._link:
            self._link.close()
        is_local = self._ranks.node == 0
        self._epoch = welcome.epoch
        self._link = link = EventLink(welcome, is_local)
        self._heart = Heart(
            welcome,
            self._ranks.rank,
            is_local,
            self._heartbeat_s,
            lambda: self._stats,
            lambda: link.sent,
        )
        self._publish_stats()
        ranks, models = self._ranks, tuple(self._engines)
        self._link.send(
            RankReady(self._epoch, ranks.rank, ranks.node, os.getpid(), self._life.before, models)
        )
        self._life.join()
        log.info("joined epoch %d", self._epoch)

    def _load(self, name: str) -> None:
        if name in self._engines:
            self._answer(ModelLoaded(self._epoch, self._ranks.rank, self._engines[name].info, 0.0))
        elif self._loader is None:
            self._answer(ModelFailed(self._epoch, self._ranks.rank, name, "there is no loader"))
        else:
            self._loader.begin(name)

    def _take_loaded(self, loader: Loader, *, wait: bool = False) -> None:
        arrival = loader.finished(wait=wait)
        if arrival is None:
            return
        rank = self._ranks.rank
        if arrival.engine is None:
            self._answer(ModelFailed(self._epoch, rank, arrival.name, arrival.problem))
            return
        self._engines[arrival.name] = arrival.engine
        self._answer(ModelLoaded(self._epoch, rank, arrival.engine.info, arrival.seconds))
        self._publish_stats()

    def _unload(self, name: str) -> None:
        engine = self._engines.pop(name, None)
        if engine is not None:
            assert self._loader is not None, "without one nobody asks for this"
            engine.abort_all()
            self._publish_stats()
            self._loader.drop(engine)
        self._answer(ModelUnloaded(self._epoch, self._ranks.rank, name))

    def _answer(self, answer: ModelAnswer) -> None:
        if self._link:
            self._link.send(answer)

    def _submit(self, request: GenerateRequest) -> None:
        if self._ranks.rank not in request.owners:
            return
        engine = self._engines.get(request.model)
        if engine is None:
            self._send([RequestFailed(request.request_id, "the model is not loaded")])
            return
        engine.add(request)

    def _step(self) -> None:
        """One step of one engine. None when the last of the work has just been cancelled."""
        if self._link and self._link.backlog > MAX_BACKLOG:
            time.sleep(IDLE_POLL_S)
            return
        if working := [n for n, engine in self._engines.items() if engine.has_work]:
            name = self._turns.choose(working)
            started = time.monotonic()
            self._send(self._engines[name].step())
            self._turns.charge(name, time.monotonic() - started)
        now = time.monotonic()
        is_idle = not any(engine.has_work for engine in self._engines.values())
        if is_idle or now - self._stats_at >= STATS_S:
            self._publish_stats()

    def _send(self, events: list[EngineEvent]) -> None:
        if self._link and events:
            self._link.send(EventBatch.of(self._epoch, self._ranks.rank, events))
            self._life.mark()

    def _publish_stats(self) -> None:
        self._stats_at = time.monotonic()
        self._stats = tuple(engine.stats() for engine in self._engines.values())
