"""Joins this process to the others through torch.distributed."""

import json
import logging
import os
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanogpt.cluster.broadcast import GROUP_TIMEOUT, Broadcast, PeerLost
from nanogpt.cluster.suspicion import PEER_LOST
from nanogpt.errors import StartupError
from nanogpt.ranks import Ranks

log = logging.getLogger(__name__)

STORE_TIMEOUT = timedelta(seconds=60)  # for the store to answer
CONNECT_TIMEOUT = timedelta(seconds=10)  # for ranks that are all there to connect to each other
SOON_S, LATER_S = 0.005, 0.1  # between two looks at who is there, at first and after a while
WATCH_EVERY_S = 1.0
# A rank of another machine that has told the store nothing for so long is gone, and so is a rank 0
# for them. Ranks that have joined are noticed sooner, by the front end; one that loads a model may
# keep its threads waiting for a while.
GONE_S = 60.0
OWN_PAUSE_S = 5.0  # between two calls of the roll: this process itself was stopped


class Group(NamedTuple):
    """The processes that work together. `ranks` are the numbers in it: nodes that are missing have
    none. `store` is None when the process is alone in the world; `generation` see below."""

    ranks: Ranks
    broadcast: Broadcast
    store: dist.Store | None = None
    generation: int = 0

    def agree(self, fingerprints: dict[str, str], arithmetic: str) -> None:
        """Raises StartupError when rank 0 has other models by the same name, or other names, or
        computes with other `arithmetic`, since a request must not get text of both; PeerLost when
        it has gone before it told."""
        if self.store is None:
            return
        key = f"models {self.generation}"
        try:
            if self.ranks.rank == 0:
                self.store.set(key, json.dumps([arithmetic, fingerprints]))
                return
            while not self.store.check([key]):  # loading takes as long as it takes
                if self.store.add("generation", 0) != self.generation:
                    raise PeerLost("another rank is gone: it has been replaced")
                time.sleep(SOON_S)
            theirs, first = json.loads(self.store.get(key))
        except RuntimeError as error:
            raise PeerLost(f"rank 0 did not tell of its models: {error}") from error
        if arithmetic != theirs:
            raise StartupError(
                f"rank {self.ranks.rank} (node {self.ranks.node}) computes with {arithmetic}, rank "
                f"0 with {theirs}, whose numbers differ in the last bits: use machines of one "
                "kind; on CPUs, python -m nanogpt.engine.cpu.build makes the kernels"
            )
        other = sorted({name for name, _ in fingerprints.items() ^ first.items()})
        if other:
            raise StartupError(
                f"node {self.ranks.node} has other weights, dtype or names than node 0: "
                f"{', '.join(other)}"
            )


def open_group(ranks: Ranks, node_wait_s: float) -> Group:
    """The group, once all ranks are there; when nodes are missing, those that are there after
    `node_wait_s`. Call before any thread is started.

    One rank needs no network. Raises PeerLost when a rank goes while they connect.
    """
    if ranks.world_size == 1:
        return Group(ranks, Broadcast(0, 1, None))
    try:
        return _connect(ranks, node_wait_s)
    except RuntimeError as error:  # torch's own errors are all of this kind
        raise PeerLost(f"the ranks could not connect: {error}") from error


def _connect(ranks: Ranks, node_wait_s: float) -> Group:
    has_nodes = ranks.world_size > ranks.local_world_size
    store = _store(ranks)
    generation, members = join_generation(
        store, ranks.rank, ranks.world_size, node_wait_s if has_nodes else float("inf")
    )
    if len(members) < ranks.world_size:
        log.error("going on with %d of %d ranks", len(members), ranks.world_size)
    ranks = ranks._replace(rank=members.index(ranks.rank), world_size=len(members))
    prefix = dist.PrefixStore(f"group {generation}", store)
    connected = threading.Event()
    roll = _Roll(ranks, generation) if has_nodes else None
    _leave_with_generation(_store(ranks), generation, connected, roll)
    broadcast = _broadcast(ranks, prefix)
    connected.set()
    return Group(ranks, broadcast, store, generation)


def _store(ranks: Ranks) -> dist.Store:
    return dist.TCPStore(ranks.store_host, ranks.store_port, is_master=False, timeout=STORE_TIMEOUT)


def _broadcast(ranks: Ranks, store: dist.Store) -> Broadcast:
    if ranks.world_size == 1:
        return Broadcast(0, 1, None)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=CONNECT_TIMEOUT,
    )
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    return Broadcast(ranks.rank, ranks.world_size, group, _lifeline(ranks))


def _lifeline(ranks: Ranks) -> dist.Work | None:
    """Work that never ends but with the end of a rank, for rank 0: it waits for a word that none
    of the others sends. They notice by themselves, since they always wait for rank 0's."""
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    if ranks.rank != 0:
        return None
    words = [torch.zeros(1) for _ in range(ranks.world_size)]
    return dist.gather(torch.zeros(1), words, dst=0, group=group, async_op=True)


def join_generation(
    store: dist.Store, rank: int, world_size: int, wait_s: float = float("inf")
) -> tuple[int, list[int]]:
    """Wait until all are in the same generation; its number, and who is in it, by rank.

    The store outlives the ranks, so what a dead group left there must not be taken for news. Each
    process that starts begins a generation, and whoever waits moves on to the latest. So the one
    that is complete has no process in it that was replaced meanwhile. Rank 0 says when it is: with
    all of `world_size`, or with those that are there after `wait_s` without news. Who comes later
    begins another generation.
    """
    latest, generation, since = store.add("generation", 1), 0, 0.0
    while True:
        now = time.monotonic()
        if latest != generation:
            generation, since = latest, now
            store.set(f"member {generation} {rank}", "")
        if rank == 0:
            there = [r for r in range(world_size) if store.check([f"member {generation} {r}"])]
            if len(there) == world_size or now - since > wait_s:
                store.set(f"members {generation}", json.dumps(there))
        if store.check([f"members {generation}"]):
            members: list[int] = json.loads(store.get(f"members {generation}"))
            if rank in members:
                return generation, members
            latest = store.add("generation", 1)  # too late for this one
            continue
        time.sleep(min(LATER_S, max(SOON_S, (now - since) / 100)))
        latest = store.add("generation", 0)


class _Roll:
    """Who of a generation is still there, by what each tells the store: a machine that loses its
    power, or its network, ends no connection."""

    def __init__(self, ranks: Ranks, generation: int) -> None:
        self._own = f"alive {generation} {ranks.rank}"
        others = range(1, ranks.world_size) if ranks.rank == 0 else [0]
        self._others = {rank: f"alive {generation} {rank}" for rank in others}
        self._heard: dict[int, tuple[int, float]] = {}  # a count, and since when
        self._called: float | None = None

    def call(self, store: dist.Store, now: float) -> list[int]:
        """Tell that this rank is there; the ranks that have not told so for too long. Call often:
        time in which it isn't called doesn't count, since others may have waited for this one."""
        if self._called is not None and now - self._called > OWN_PAUSE_S:
            pause = now - self._called
            self._heard = {rank: (n, since + pause) for rank, (n, since) in self._heard.items()}
        self._called = now
        store.add(self._own, 1)
        for rank, key in self._others.items():
            count = store.add(key, 0)
            if self._heard.get(rank, (-1, 0.0))[0] != count:
                self._heard[rank] = count, now
        return [rank for rank, (_, since) in self._heard.items() if now - since > GONE_S]


def _leave_with_generation(
    store: dist.Store, generation: int, connected: threading.Event, roll: _Roll | None
) -> None:
    """End this process when another generation has begun, or the store is gone, while it connects:
    torch waits as long for a rank that has died as it may for a word later. Between machines, where
    no connection tells that the group is over when a network is cut for a while, this goes on for
    ever, and has a `roll` of who is there."""

    def watch() -> None:
        try:
            while store.add("generation", 0) == generation:
                if roll and (gone := roll.call(store, time.monotonic())):
                    log.error("nothing has come from rank %d for %.0f s", gone[0], GONE_S)
                    os._exit(PEER_LOST)
                if connected.wait(LATER_S):
                    if not roll:
                        return
                    time.sleep(WATCH_EVERY_S)
            log.error("another group has begun")
        except RuntimeError as error:
            log.error("the store of node 0 is gone: %s", error)
        os._exit(PEER_LOST)

    threading.Thread(target=watch, name="generation", daemon=True).start()
