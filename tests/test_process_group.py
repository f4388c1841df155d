"""Ranks that connect, as real processes, while one of them dies."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from nanogpt.cluster.suspicion import PEER_LOST
from tests.server import ROOT

JOIN = """
import os
import torch.distributed as dist
from nanogpt.cluster import process_group
from nanogpt.ranks import Ranks
ranks = Ranks({rank}, 2, {rank}, 2, 0, "127.0.0.1", {port})
"""
# As far as a rank may come before it dies, each a point at which the others wait for its next step.
DEATHS = {
    "before it connects": "process_group._broadcast = lambda *_: os._exit(9)",
    "between two groups": "dist.new_group = lambda *_, **__: os._exit(9)",
    "between the last two": (
        "real, calls = dist.new_group, []\n"
        "def die(*args, **more):\n"
        "    calls.append(1)\n"
        "    return os._exit(9) if len(calls) == 2 else real(*args, **more)\n"
        "dist.new_group = die"
    ),
}
OPEN = """
process_group.open_group(ranks, 1.0)
print("connected", flush=True)
"""


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )


def start(rank: int, store: dist.TCPStore, death: str = "") -> subprocess.Popen[str]:
    code = JOIN.format(rank=rank, port=store.port) + death + OPEN
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("death", "rank"), [(d, r) for r in (0, 1) for d in DEATHS if r or d != "before it connects"]
)
def test_who_connects_to_a_rank_that_dies_moves_on_to_the_next_generation(store, death, rank):
    """It waited for ever, and the one in the dead one's place for it: found by the chaos command,
    with a rank that ended just after torchrun had been killed."""
    other, dead = start(1 - rank, store), start(rank, store, DEATHS[death])
    assert dead.wait(60) == 9
    dead.stdout.close()
    heir = start(rank, store)
    assert other.wait(60) in (PEER_LOST, 1)  # 1: it was told by the connection
    other.stdout.close()
    successor = start(1 - rank, store)
    for process in (heir, successor):
        assert process.communicate(timeout=60)[0] == "connected\n"
        assert process.returncode == 0
