"""Ranks that connect, as real processes, while one of them dies."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
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


def stop(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def at_first_group(end: Callable[..., None]) -> None:
    dist.new_group = end


def at_second_group(end: Callable[..., None]) -> None:
    new_group, calls = dist.new_group, []

    def second(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return end() if len(calls) == 2 else new_group(*args, **more)

    dist.new_group = second


def connecting(end: Callable[..., None]) -> None:
    process_group._broadcast = end


def connected(end: Callable[..., None]) -> None:
    open_group = process_group.open_group
    process_group.open_group = lambda *args: (open_group(*args), end())


# As far as a rank may come before it dies, each a point at which the others wait for its next step.
DEATHS = {
    "before it connects": partial(connecting, die),
    "between two groups": partial(at_first_group, die),
    "between the last two": partial(at_second_group, die),
}


def connect(rank: int, port: int, death: Callable[[], None] | None) -> None:
    """What a rank does; its process ends with 0 once it is connected."""
    if death:
        death()
    process_group.open_group(Ranks(rank, 2, rank, 2, 0, "127.0.0.1", port), 1.0)
    os._exit(0)


def connect_machines(rank: int, port: int, death: Callable[[], None] | None) -> None:
    """The same, each rank on a machine of its own."""
    process_group.GONE_S = 1.0
    if death:
        death()
    process_group.open_group(Ranks(rank, 2, 0, 1, rank, "127.0.0.1", port), 1.0)
    time.sleep(WAIT_S)


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )


@pytest.fixture
def start(store):
    started = []

    def start(
        rank: int, death: Callable[[], None] | None = None, target: Callable[..., None] = connect
    ) -> ForkServerProcess:
        process = FORKS.Process(target=target, args=(rank, store.port, death))
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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", [connecting, at_second_group, connected])
def test_a_machine_that_goes_silent_before_it_has_joined_is_missed(start, when, rank):
    """No connection ends, and nobody there begins another generation: the others waited for
    ever."""
    other = start(1 - rank, target=connect_machines)
    start(rank, partial(when, stop), connect_machines)
    assert exit_code(other) in (PEER_LOST, 1)  # 1: torch's own patience while it connects
