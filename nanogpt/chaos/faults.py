"""The faults that a run injects, each as an operator, a bug or bad luck would."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from nanogpt.chaos.cluster import ChaosCluster

IN_A_DRAIN = (
    ("rank", signal.SIGKILL),
    ("rank", signal.SIGSTOP),
    ("parent", signal.SIGKILL),
    ("torchrun", signal.SIGKILL),
    ("torchrun", signal.SIGSTOP),
    ("master", signal.SIGKILL),
    ("master", signal.SIGSTOP),
)
LONGEST_STOP_S = 15.0  # of the front end: past the watchdog's patience, and the leases of jobs


class Injury(NamedTuple):
    """What was done, and when. `new_epoch`: whether only a new worker group can recover; `ending`:
    processes that must have gone before."""

    at: float
    detail: str
    new_epoch: bool = True
    ending: frozenset[int] = frozenset()
    problem: str = ""


Inject = Callable[[ChaosCluster, random.Random], Injury]


def _signal(pids: list[int], number: signal.Signals) -> str:
    """Signal those that are still there."""
    sent = []
    for pid in pids:
        try:
            os.kill(pid, number)
            sent.append(str(pid))
        except ProcessLookupError:
            continue  # it has ended since it was listed: a fault before this one is at work
    return f"{number.name} to {', '.join(sent) or 'nobody'}"


def _one(role: str, number: signal.Signals) -> Inject:
    def inject(cluster: ChaosCluster, rng: random.Random) -> Injury:
        pid = rng.choice(cluster.wait_for(role))
        return Injury(time.monotonic(), _signal([pid], number))

    return inject


def _all_of(role: str, number: signal.Signals = signal.SIGKILL) -> Inject:
    def inject(cluster: ChaosCluster, rng: random.Random) -> Injury:
        pids = cluster.wait_for(role)
        return Injury(time.monotonic(), _signal(pids, number))

    return inject


def _kill_of_front_end(role: str) -> Inject:
    """Of "worker" or "master". Without its master a worker goes on for a while, not for long."""

    def inject(cluster: ChaosCluster, rng: random.Random) -> Injury:
        pids, workers = cluster.wait_for(role), frozenset(cluster.wait_for("worker"))
        return Injury(time.monotonic(), _signal(pids, signal.SIGKILL), ending=workers)

    return inject


def _hang_rank(cluster: ChaosCluster, rng: random.Random) -> Injury:
    """The loop of a rank stops; the process goes on beating. Only a rank that has joined has one:
    see hooks/sitecustomize.py."""
    cluster.wait_ready()
    return _one("rank", signal.SIGUSR2)(cluster, rng)


def _stop_of_front_end(role: str, longest_s: float) -> Inject:
    def inject(cluster: ChaosCluster, rng: random.Random) -> Injury:
        pids, seconds = cluster.wait_for(role), rng.uniform(0.2, longest_s)
        at, detail = time.monotonic(), _signal(pids, signal.SIGSTOP)
        time.sleep(seconds)
        _signal(pids, signal.SIGCONT)
        return Injury(at, f"{detail} for {seconds:.1f} s", new_epoch=False)

    return inject


def _reload(cluster: ChaosCluster, rng: random.Random) -> Injury:
    """To the same configuration: the ranks are new ones all the same."""
    cluster.wait_ready()  # before, the launcher may not yet know what SIGHUP means
    at = time.monotonic()
    cluster.launcher.send_signal(signal.SIGHUP)
    return Injury(at, "SIGHUP to the launcher")


def _drain(cluster: ChaosCluster, rng: random.Random) -> Injury:
    """A rolling restart of the only server: what was accepted finishes, then another starts."""
    return _restart(cluster)


def _worse_drain(cluster: ChaosCluster, rng: random.Random) -> Injury:
    """As `_drain`, with another fault in the middle of it that breaks no connection."""
    role, number = rng.choice(IN_A_DRAIN)
    delay_s, pids = rng.uniform(0.0, 1.0), cluster.wait_for(role)

    def strike() -> str:
        time.sleep(delay_s)
        return f", {_signal(pids[:1], number)} ({role}) after {delay_s:.1f} s"

    return _restart(cluster, strike)


def _restart(cluster: ChaosCluster, meanwhile: Callable[[], str] = lambda: "") -> Injury:
    cluster.wait_for("torchrun")  # before, the launcher may not yet know what SIGTERM means
    started = time.monotonic()
    cluster.ask_stop()
    also = meanwhile()
    code = cluster.stop()
    took, left = time.monotonic() - started, cluster.left_behind()
    problem = f"the drain ended with exit code {code}" if code else ""
    if left:
        problem = f"the drain left behind: {'; '.join(left)}"
    cluster.start()
    return Injury(started, f"drained in {took:.1f} s{also}", problem=problem)


FAULTS: dict[str, Inject] = {
    "kill-rank": _one("rank", signal.SIGKILL),
    "kill-all": _all_of("rank"),
    "exit-rank": _one("rank", signal.SIGUSR1),  # with code 0: see hooks/sitecustomize.py
    "stop-rank": _one("rank", signal.SIGSTOP),
    "hang-rank": _hang_rank,
    "kill-parent": _one("parent", signal.SIGKILL),  # of a rank
    "stop-parent": _one("parent", signal.SIGSTOP),
    "kill-torchrun": _all_of("torchrun"),
    "stop-torchrun": _all_of("torchrun", signal.SIGSTOP),
    "stop-frontend": _stop_of_front_end("worker", LONGEST_STOP_S),
    "stop-master": _stop_of_front_end("master", 4.0),
    "reload": _reload,
    "drain": _drain,
    "worse-drain": _worse_drain,
    "kill-worker": _kill_of_front_end("worker"),
    "kill-master": _kill_of_front_end("master"),
}

# Whoever holds the connections dies: clients see them break, and no wrong answer.
BREAKING = frozenset({"kill-worker"})
# The port has nobody behind it for a while, so that new requests may get no answer at all.
DRAINS = frozenset({"drain", "worse-drain"})
ABSENT = BREAKING | DRAINS | {"kill-master"}
# Who has been connected may wait meanwhile until anybody reads the request.
UNREAD = BREAKING | {"kill-master", "stop-frontend"}
DEFAULT = tuple(kind for kind in FAULTS if kind not in BREAKING)
