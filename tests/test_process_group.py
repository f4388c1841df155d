"""Ranks that connect, as real processes, while one of them dies."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from typing import Any

import pytest
import torch.distributed as dist

from nanogpt.cluster import process_group
from nanogpt.cluster.suspicion import PEER_LOST
from nanogpt.ranks import Ranks

# One process imports torch, and ranks are forked from it, as the product does.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
WAIT_S = 60


def die(*_: Any, **__: Any) -> None:
    os._exit(9)


def die_connecting() -> None:
    process_group._broadcast = die


def die_at_first_group() -> None:
    dist.new_group = die


def die_at_second_group() -> None:
    new_group, calls = dist.new_group, []

    def at_second(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return die() if len(calls) == 2 else new_group(*args, **more)

    dist.new_group = at_second


# As far as a rank may come before it dies, each a point at which the others wait for its next step.
DEATHS = {
    "before it connects": die_connecting,
    "between two groups": die_at_first_group,
    "between the last two": die_at_second_group,
}


def connect(rank: int, port: int, death: Callable[[], None] | None) -> None:
    """What a rank does; its process ends with 0 once it is connected."""
    if death:
        death()
    process_group.open_group(Ranks(rank, 2, rank, 2, 0, "127.0.0.1", port), 1.0)
    os._exit(0)


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )


@pytest.fixture
def start(store):
    started = []

    def start(rank: int, death: Callable[[], None] | None = None) -> ForkServerProcess:
        process = FORKS.Process(target=connect, args=(rank, store.port, death))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def exit_code(process: ForkServerProcess) -> int | None:
    process.join(WAIT_S)
    return process.exitcode


@pytest.mark.parametrize(
    ("death", "rank"), [(d, r) for r in (0, 1) for d in DEATHS if r or d != "before it connects"]
)
def test_who_connects_to_a_rank_that_dies_moves_on_to_the_next_generation(start, death, rank):
    """It waited for ever, and the one in the dead one's place for it: found by the chaos command,
    with a rank that ended just after torchrun had been killed."""
    other, dead = start(1 - rank), start(rank, DEATHS[death])
    assert exit_code(dead) == 9
    heir = start(rank)
    assert exit_code(other) in (PEER_LOST, 1)  # 1: it was told by the connection
    successor = start(1 - rank)
    assert (exit_code(heir), exit_code(successor)) == (0, 0)
