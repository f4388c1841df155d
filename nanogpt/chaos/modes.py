"""The three kinds of run. Each one returns figures beyond those of the history."""

import argparse
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from nanogpt import process
from nanogpt.chaos.cluster import ChaosCluster, ClusterError
from nanogpt.chaos.history import Fault, History
from nanogpt.chaos.run import Limits, Load, Sampler, inject_faults

LAST_ANSWERS_S = 240.0  # after the last fault, for what is in progress
MEASURE_S = 10.0  # of a closed loop, to know what the cluster can do
TIMES_CAPACITY = 10
AT_ONCE_S = 1.0  # by which the first answer after a long idle time may be later than one before

Mode = Callable[[ChaosCluster, History, Load, argparse.Namespace], dict[str, Any]]


@contextmanager
def _progress(load: Load, seconds: float, description: str) -> Iterator[Callable[[Fault], None]]:
    """A bar of the seconds that have passed, with the counts so far."""
    faults: Counter[str] = Counter()
    stop = threading.Event()
    started = time.monotonic()

    with tqdm(total=round(seconds), desc=description, unit="s", disable=None) as bar:

        def show() -> None:
            while not stop.wait(1.0):
                bar.set_postfix(requests=load.sent, faults=faults.total(), refresh=False)
                bar.update(min(bar.total, int(time.monotonic() - started)) - bar.n)
                bar.refresh()

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield lambda fault: faults.update([fault.kind])
        finally:
            stop.set()
            thread.join()


def _finish(load: Load) -> None:
    if not load.stop(LAST_ANSWERS_S):
        raise ClusterError(f"a request had no answer within {LAST_ANSWERS_S:.0f} s of the end")


def faults(
    cluster: ChaosCluster, history: History, load: Load, args: argparse.Namespace
) -> dict[str, Any]:
    """Load, and faults at random."""
    sampler = Sampler(cluster, history)
    limits = Limits(args.duration, args.kills)
    with _progress(load, args.duration, "chaos") as on_fault:
        load.start(args.requests_in_flight)
        try:
            inject_faults(cluster, history, load, args.faults, args.seed, limits, on_fault)
        finally:
            sampler.stop()
            _finish(load)
    return {}


def overload(
    cluster: ChaosCluster, history: History, load: Load, args: argparse.Namespace
) -> dict[str, Any]:
    """Requests at ten times the rate that the cluster serves, whether or not others have been
    answered. Those beyond the server's limits must be refused at once and properly."""
    load.start(args.requests_in_flight)
    before, started = load.sent, time.monotonic()
    time.sleep(MEASURE_S)
    _finish(load)
    rate = (load.sent - before) / (time.monotonic() - started)
    sampler = Sampler(cluster, history)
    with _progress(load, args.duration, "overload"):
        try:
            load.flood(rate * TIMES_CAPACITY, args.duration)
        finally:
            _finish(load)
            sampler.stop()
    return {"capacity_per_s": round(rate, 1), "offered_per_s": round(rate * TIMES_CAPACITY, 1)}


def idle(
    cluster: ChaosCluster, history: History, load: Load, args: argparse.Namespace
) -> dict[str, Any]:
    """Nothing for a long time, then a request, which must be answered at once."""
    warm = _seconds(load)
    sampler = Sampler(cluster, history)
    busy = _cpu_seconds(cluster)
    with _progress(load, args.duration, "idle"):
        time.sleep(args.duration)
    used = (_cpu_seconds(cluster) - busy) / args.duration
    after = _seconds(load)
    sampler.stop()
    if after > warm + AT_ONCE_S:
        raise ClusterError(f"the first answer took {after:.2f} s, one before {warm:.2f} s")
    return {
        "warm_s": round(warm, 3),
        "after_idle_s": round(after, 3),
        "idle_cpu": round(used, 4),  # cores, all processes together
    }


def _seconds(load: Load) -> float:
    """How long the first template takes, unstreamed."""
    started = time.monotonic()
    load.repeat(template=0)
    return time.monotonic() - started


def _cpu_seconds(cluster: ChaosCluster) -> float:
    return sum(process.cpu_seconds(member.pid) for member in cluster.members())


MODES: dict[str, Mode] = {"faults": faults, "overload": overload, "idle": idle}
