"""The loop of one rank: commands in, a step of each engine, events out."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Protocol

from nanogpt.cluster.broadcast import Broadcast
from nanogpt.cluster.heart import Heart
from nanogpt.cluster.lead import Lead
from nanogpt.cluster.messages import Cancel, Decoder, EventBatch, Frame, RankReady, Submit, Welcome
from nanogpt.cluster.respawn import Life
from nanogpt.cluster.transport import EventLink
from nanogpt.ranks import Ranks
from nanogpt.request import EngineEvent, EngineStats, GenerateRequest, RequestFailed

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.001  # how late an idle rank may see a broadcast
IDLE_WAIT_MS = 200  # rank 0 wakes up when a message comes; this is for its other duties
STATS_S = 0.2  # how old the statistics in a beat may be while steps go on
MAX_BACKLOG = 1000  # event messages the front end has not taken: generate no more until it has


class Engine(Protocol):
    """What the loop needs of an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def abort_all(self) -> None: ...
    def step(self) -> list[EngineEvent]: ...
    def stats(self) -> EngineStats: ...


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
    ) -> None:
        """`life` is what this rank's parent and it tell each other."""
        self._ranks, self._engines, self._broadcast = ranks, engines, broadcast
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
            idle_ms = 1 if self._broadcast.pending else IDLE_WAIT_MS
            self._lead.turn(0 if busy else idle_ms)
        payloads = self._broadcast.poll()
        for payload in payloads:
            for command in self._decode(payload).commands:
                self._apply(command)
        if self._link and self._link.backlog:
            self._link.flush()
        if busy:
            self._step()
        elif not self._lead and not payloads:
            time.sleep(IDLE_POLL_S)
        self._life.turn()

    def _apply(self, command: Welcome | Submit | Cancel) -> None:
        if isinstance(command, Welcome):
            self._enter(command)
        elif command.epoch != self._epoch:
            log.debug("dropped a command of epoch %d", command.epoch)
        elif isinstance(command, Submit):
            self._submit(command.request)
        else:
            for engine in self._engines.values():
                engine.abort(command.request_id, command.index)

    def _enter(self, welcome: Welcome) -> None:
        """A new epoch: nothing of the old one is wanted any more."""
        for engine in self._engines.values():
            engine.abort_all()
        if self._heart:
            self._heart.stop()
        if self._link:
            self._link.close()
        is_local = self._ranks.node == 0
        self._epoch = welcome.epoch
        self._link = EventLink(welcome, is_local)
        self._heart = Heart(
            welcome, self._ranks.rank, is_local, self._heartbeat_s, lambda: self._stats
        )
        self._publish_stats()
        ranks = self._ranks
        self._link.send(
            RankReady(self._epoch, ranks.rank, ranks.node, os.getpid(), self._life.before)
        )
        self._life.join()
        log.info("joined epoch %d", self._epoch)

    def _submit(self, request: GenerateRequest) -> None:
        if self._ranks.rank not in request.owners:
            return
        engine = self._engines.get(request.model)
        if engine is None:
            self._send([RequestFailed(request.request_id, "the model is not loaded")])
            return
        engine.add(request)

    def _step(self) -> None:
        if self._link and self._link.backlog > MAX_BACKLOG:
            time.sleep(IDLE_POLL_S)
            return
        for engine in self._engines.values():
            if engine.has_work:
                self._send(engine.step())
        is_idle = not any(engine.has_work for engine in self._engines.values())
        if is_idle or time.monotonic() - self._stats_at >= STATS_S:
            self._publish_stats()

    def _send(self, events: list[EngineEvent]) -> None:
        if self._link and events:
            self._link.send(EventBatch.of(self._epoch, self._ranks.rank, events))
            self._life.mark()

    def _publish_stats(self) -> None:
        self._stats_at = time.monotonic()
        self._stats = tuple(engine.stats() for engine in self._engines.values())
