"""Joins this process to the others through torch.distributed."""

from datetime import timedelta

import torch.distributed as dist

from nanogpt.cluster.broadcast import GROUP_TIMEOUT, Broadcast
from nanogpt.ranks import Ranks

JOIN_TIMEOUT = timedelta(seconds=120)  # for all ranks to import torch and find each other


def open_group(ranks: Ranks) -> Broadcast:
    """The broadcast from rank 0. Call before any thread is started. One rank needs no network."""
    if ranks.world_size == 1:
        return Broadcast(0, 1, None)
    store = dist.TCPStore(
        ranks.store_host,
        ranks.store_port,
        ranks.world_size,
        is_master=ranks.hosts_store,
        timeout=JOIN_TIMEOUT,
    )
    dist.init_process_group(
        "gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=JOIN_TIMEOUT
    )
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    return Broadcast(ranks.rank, ranks.world_size, group)
