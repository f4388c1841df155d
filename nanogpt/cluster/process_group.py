"""Joins this process to the others through torch.distributed."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nanogpt.cluster.broadcast import GROUP_TIMEOUT, Broadcast, PeerLost
from nanogpt.ranks import Ranks

STORE_TIMEOUT = timedelta(seconds=60)  # for torchrun's store to answer
CONNECT_TIMEOUT = timedelta(seconds=10)  # for ranks that are all there to connect to each other
LOOK_EVERY_S = 0.005


def open_group(ranks: Ranks) -> Broadcast:
    """The broadcast from rank 0, once all ranks are there. Call before any thread is started.

    One rank needs no network. Raises PeerLost when a rank goes while they connect.
    """
    if ranks.world_size == 1:
        return Broadcast(0, 1, None)
    try:
        return _connect(ranks)
    except RuntimeError as error:  # torch's own errors are all of this kind
        raise PeerLost(f"the ranks could not connect: {error}") from error


def _connect(ranks: Ranks) -> Broadcast:
    store = dist.TCPStore(
        ranks.store_host, ranks.store_port, is_master=False, timeout=STORE_TIMEOUT
    )
    generation = join_generation(store, ranks.world_size)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"group {generation}", store),
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


def join_generation(store: dist.Store, world_size: int) -> int:
    """Wait until `world_size` processes are in the same generation; its number.

    torchrun's store outlives the ranks, so what a dead group left there must not be taken for news.
    Each process that starts begins a generation, and whoever waits moves on to the latest. So the
    one that is complete has no process in it that was replaced meanwhile.
    """
    store.add("generation", 1)
    generation = 0
    while True:
        latest = store.add("generation", 0)
        if latest != generation:
            generation = latest
            store.add(f"joined {generation}", 1)
        elif store.add(f"joined {generation}", 0) >= world_size:
            return generation
        else:
            time.sleep(LOOK_EVERY_S)
