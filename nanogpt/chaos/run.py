"""Runs: load, faults, and the history of both."""

import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from nanogpt.chaos import processes
from nanogpt.chaos.client import ask
from nanogpt.chaos.cluster import ChaosCluster, ClusterError
from nanogpt.chaos.faults import DRAINS, FAULTS
from nanogpt.chaos.history import Behaviour, Expected, Fault, History, Sample
from nanogpt.chaos.load import make_body, may_stream

SAMPLE_EVERY_S = 2.0
RETRY_S = 0.3  # a client that was refused sends its next request after this
FIRST_TOKEN_S = 120.0  # after a fault: longer means that the cluster did not recover
HURRY = 0.15  # of the faults strike while the cluster still recovers from the one before


class Pulse:
    """Says when the first token came after a given moment. Thread-safe."""

    def __init__(self) -> None:
        self._since = float("inf")
        self._first: float | None = None
        self._came = threading.Condition()

    def beat(self) -> None:
        now = time.monotonic()
        if now >= self._since and self._first is None:
            with self._came:
                self._first = now
                self._came.notify_all()

    def first_after(self, since: float, timeout_s: float) -> float | None:
        with self._came:
            self._first, self._since = None, since
            self._came.wait_for(lambda: self._first is not None, timeout_s)
            self._since = float("inf")
            return self._first


class Load:
    """Clients that send requests in a closed loop, each drawn from the same templates."""

    def __init__(
        self, cluster: ChaosCluster, history: History, bodies: list[dict[str, Any]], seed: int
    ) -> None:
        self._cluster, self._history, self._bodies = cluster, history, bodies
        self._seed = seed
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.sent = 0
        self.pulse = Pulse()

    def start(self, in_flight: int) -> None:
        for _ in range(in_flight):
            thread = threading.Thread(target=self._client, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Send no more; whether all got their answers in time."""
        self._stop.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _client(self) -> None:
        while not self._stop.is_set():
            if self.one(next(self._numbers)) not in ("complete", "left"):
                self._stop.wait(RETRY_S)

    def flood(self, rate: float, duration_s: float) -> None:
        """Send `rate` requests a second, whether or not the ones before are answered."""
        self._stop.clear()
        started = time.monotonic()
        for sent in range(int(rate * duration_s)):
            time.sleep(max(0.0, started + sent / rate - time.monotonic()))
            thread = threading.Thread(target=self.one, args=[next(self._numbers)], daemon=True)
            self._threads = [t for t in self._threads if t.is_alive()]
            self._threads.append(thread)
            thread.start()

    def repeat(self, template: int) -> None:
        """Send this request once, and wait for its answer."""
        self._ask(next(self._numbers), template, stream=False)

    def one(self, number: int) -> str:
        """Send the request of this number; its outcome."""
        rng = random.Random(f"{self._seed} {number}")
        template = rng.randrange(len(self._bodies))
        stream = may_stream(self._bodies[template]) and rng.random() < 0.6
        behaviour: Behaviour = "reads"
        if stream:
            behaviour = rng.choices(("reads", "leaves", "dawdles"), (0.8, 0.1, 0.1))[0]
        return self._ask(number, template, stream=stream, behaviour=behaviour)

    def _ask(
        self, number: int, template: int, *, stream: bool, behaviour: Behaviour = "reads"
    ) -> str:
        asked = ask(
            self._cluster.port,
            number,
            template,
            self._bodies[template],
            stream=stream,
            behaviour=behaviour,
            on_tokens=self.pulse.beat,
        )
        self._history.add(asked)
        self.sent += 1
        return asked.outcome


def consult_oracle(
    cluster: ChaosCluster, history: History, seed: int, count: int
) -> list[dict[str, Any]]:
    """The templates of the load, with their answers written down. Raises ClusterError."""
    rng = random.Random(seed)
    bodies = [make_body(rng) for _ in range(count)]
    for template, body in enumerate(bodies):
        asked = ask(cluster.port, -1, template, body, stream=False)
        if asked.outcome != "complete":
            text = asked.chunks[0].data if asked.chunks else asked.error
            raise ClusterError(f"the oracle could not answer {body}: {text}")
        answer = json.loads(asked.chunks[0].data)
        history.add(Expected(template=template, body=body, answer=answer))
    return bodies


class Sampler:
    """Writes down from time to time what each process holds."""

    def __init__(self, cluster: ChaosCluster, history: History) -> None:
        self._cluster, self._history = cluster, history
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            for member in self._cluster.members():
                rss, files = processes.rss_mib(member.pid), processes.open_files(member.pid)
                if rss is not None and files is not None and member.role != "other":
                    self._history.add(
                        Sample(
                            at=time.monotonic(),
                            role=member.role,
                            pid=member.pid,
                            rss_mib=round(rss, 1),
                            files=files,
                        )
                    )


class Limits(NamedTuple):
    """When a run has had enough: whatever comes first."""

    duration_s: float
    faults: int


def inject_faults(
    cluster: ChaosCluster,
    history: History,
    load: Load,
    kinds: tuple[str, ...],
    seed: int,
    limits: Limits,
    on_fault: Callable[[Fault], None],
) -> None:
    """Faults of these kinds in random order, each as often in a round as it is there, until the
    limits. Raises ClusterError when one is not recovered from."""
    rng = random.Random(f"{seed} faults")
    deadline = time.monotonic() + limits.duration_s
    order: list[str] = []
    for number in range(limits.faults):
        if time.monotonic() > deadline:
            return
        if not order:  # rounds, so that a short run has them all
            order = rng.sample(kinds, len(kinds))
        time.sleep(rng.uniform(0.1, 2.0))
        hurry = rng.random() < HURRY and number + 1 < limits.faults
        fault = _strike(cluster, load, number, order.pop(), rng, wait=not hurry)
        history.add(fault)
        on_fault(fault)
        if fault.problem:
            raise ClusterError(f"{fault.kind}: {fault.problem}")


def _strike(
    cluster: ChaosCluster, load: Load, number: int, kind: str, rng: random.Random, *, wait: bool
) -> Fault:
    """One fault; the first token after it is waited for unless the next one is to come sooner."""
    epoch, log_size = cluster.epoch(), cluster.log_size()
    injury = FAULTS[kind](cluster, rng)
    healed, loading_s, problem = None, 0.0, injury.problem
    if wait and not problem:
        try:
            cluster.wait_ended(injury.ending)
            if injury.new_epoch:
                cluster.wait_ready(0 if kind in DRAINS else epoch, FIRST_TOKEN_S)
            healed = load.pulse.first_after(time.monotonic(), FIRST_TOKEN_S)
            loading_s = cluster.loading_s(log_size)
            problem = "" if healed else f"no token for {FIRST_TOKEN_S:.0f} s after it"
        except ClusterError as error:
            problem = str(error)
    return Fault(
        number=number,
        kind=kind,
        at=injury.at,
        healed=healed,
        loading_s=loading_s,
        detail=injury.detail,
        problem=problem,
    )
