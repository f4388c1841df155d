"""Kills enqueuers, workers and Redis and stops workers for a while, and looks whether any job was
lost, done twice, or written to by one that no longer had it.

    python -m tests.kill_jobs --jobs 10000 --faults 500       some minutes; the short one is a test
    python -m tests.kill_jobs --queue sqs                     messages in a stand-in for SQS

A stopped worker sleeps through its leases, and then goes on as if it still had them: its late
writes must be refused. Some jobs are silent for longer than a lease: those who carry them out must
keep them all the same.

Every process has a log to which it adds a line when the store has told it that something is done.
What a log says is compared with what Redis has at the end. Each record says which lease wrote it.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanogpt.jobs import redis_scripts
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.runner import Lease, Runner
from nanogpt.jobs.shared import open_shared
from nanogpt.jobs.store import Job, StoreUnavailable
from nanogpt.jobs_config import JobsConfig, QueueConfig
from tests.redis_server import RedisServer, redis_server
from tests.sqs_server import CREDENTIALS, sqs_server

RECORDS = 5
LEASE_S = 1.5
STOP_S = SILENT_S = 2 * LEASE_S
SILENT_EVERY = 20  # of an enqueuer's jobs, its first among them
ENQUEUERS, WORKERS, MOST_STOPPED = 2, 4, 2
END_S = 120.0  # for what was accepted to be done, once nothing is killed any more
# The faults of a round, which come in random order.
ROUND = (
    *["kill worker"] * 5,
    *["stop worker"] * 2,
    *["kill enqueuer"] * 3,
    *["kill redis"] * 2,
)
SABOTAGE = ("fences", "renewal")


def open_store(url: str, results: str) -> RedisStore:
    return open_shared(QueueConfig(url=url, results=results), JobsConfig(max_queued=10**6))


def enqueue(store: RedisStore, log: Path, pause_s: float) -> None:
    """Puts jobs for ever; those that were accepted are in the log."""
    with log.open("a", buffering=1) as file:
        for i in range(10**9):
            name = f"{log.stem}-{i}"
            job = Job(
                id=name,
                kind="completion",
                owner="o",
                created=time.time(),
                request=b"silent" if i % SILENT_EVERY == 0 else b"",
                keep_s=1e6,
            )
            try:
                store.put(job)
            except StoreUnavailable:
                time.sleep(0.05)
                continue
            file.write(f"{name}\n")
            time.sleep(pause_s)


def work(store: RedisStore, log: Path) -> None:
    """Carries jobs out for ever; those that it has ended are in the log, with its fence."""
    with log.open("a", buffering=1) as file:

        def execute(lease: Lease) -> None:
            for i in range(len(list(lease.each_record())), RECORDS):
                _append(lease, [f"{i} {lease.job.fence}".encode()])
                time.sleep(0.002)
            if lease.job.request == b"silent":
                _append(lease, [], state=b"silent")  # progress: most attempts are killed
                time.sleep(SILENT_S)
            lease.complete("completed", str(lease.job.fence).encode())
            file.write(f"{lease.job.id} {lease.job.fence}\n")

        runner = Runner(
            store,
            {"completion": execute},
            ready=lambda: True,
            size=lambda job: 1,
            room=16,
            failed=lambda job, error: repr(error).encode(),
            lease_s=LEASE_S,
        )
        runner.start()
        signal.pause()


def _append(lease: Lease, records: list[bytes], state: bytes | None = None) -> None:
    """However long the store takes to be there."""
    while True:
        try:
            return lease.append(records, state)
        except StoreUnavailable:
            time.sleep(0.05)


def sabotage(what: str) -> None:
    """A bug in this process that a run must find."""
    if what == "renewal":
        setattr(RedisStore, "renew", lambda *_: {})  # noqa: B010 (a method)
    check = " or found[2] ~= fence"
    for name in ("APPEND", "COMPLETE") if what == "fences" else ():
        script = getattr(redis_scripts, name)
        assert check in script
        setattr(redis_scripts, name, script.replace(check, ""))


class Report(NamedTuple):
    accepted: int
    silent: int  # of them
    faults: Counter[str]
    wrong: list[str]


class Loop:
    """The processes, and what is done to them."""

    def __init__(
        self,
        redis: RedisServer,
        queue: QueueConfig,
        directory: Path,
        seed: int,
        kinds: Sequence[str],
        options: Sequence[str],
    ) -> None:
        self._redis, self._queue = redis, queue
        self._directory, self._options = directory, options
        self._random = random.Random(seed)
        self._kinds, self._round = kinds, list[str]()
        self._started = 0
        self._alive: dict[str, list[tuple[subprocess.Popen[bytes], Path]]] = {}
        self._stopped: dict[subprocess.Popen[bytes], float] = {}  # until when
        self.faults: Counter[str] = Counter()

    def start(self, role: str) -> None:
        self._started += 1
        log = self._directory / f"{role}{self._started}"
        command = [sys.executable, "-m", "tests.kill_jobs", role, self._queue.url, str(log)]
        options = ["--results", self._queue.results, *self._options]
        process = subprocess.Popen([*command, *options], env={**os.environ, **CREDENTIALS})
        self._alive.setdefault(role, []).append((process, log))

    def strike(self) -> None:
        """The next fault. Nothing, when there is nobody for it: all are still starting, and killing
        those proves nothing, or enough are stopped."""
        self._round = self._round or self._random.sample(self._kinds, len(self._kinds))
        if not self._round:
            return
        fault = self._round.pop()
        action, role = fault.split()
        done = self._kill_redis() if role == "redis" else self._strike_one(action, role)
        self.faults[fault] += done

    def _kill_redis(self) -> bool:
        self._redis.kill()
        time.sleep(self._random.random() / 5)
        self._redis.start()
        return True

    def _strike_one(self, action: str, role: str) -> bool:
        """Kill one and start another in its place, or stop one for a while."""
        at_work = [p for p in self._alive[role] if p[1].exists() and p[0] not in self._stopped]
        if not at_work or (action == "stop" and len(self._stopped) >= MOST_STOPPED):
            return False
        victim = self._random.choice(at_work)
        if action == "stop":
            victim[0].send_signal(signal.SIGSTOP)
            self._stopped[victim[0]] = time.monotonic() + STOP_S
        else:
            self._alive[role].remove(victim)
            self._end(victim[0])
            self.start(role)
        return True

    def wake(self) -> bool:
        """Let those go on whose time is over; whether others are still stopped."""
        for process, until in list(self._stopped.items()):
            if time.monotonic() >= until:
                process.send_signal(signal.SIGCONT)
                del self._stopped[process]
        return bool(self._stopped)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def stop(self, role: str) -> None:
        for process, _ in self._alive.pop(role, []):
            self._end(process)

    def lines(self, role: str) -> list[str]:
        """Of all logs; the last one of a killed process may lack its end."""
        texts = [path.read_text() for path in self._directory.glob(f"{role}*")]
        return [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]


def run(
    jobs: int,
    faults: int,
    seed: int,
    pause_s: float = 0.005,
    kind: str = "redis",
    kinds: Sequence[str] = ROUND,
    sabotaged: str = "",
    end_s: float = END_S,
) -> Report:
    """Until so many jobs were accepted and so many faults struck, and all is done. `sabotaged`
    puts a bug into the workers."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        redis = stack.enter_context(redis_server(Path(folder, "redis")))
        queue = QueueConfig(url=redis.url)
        if kind == "sqs":
            sqs = stack.enter_context(sqs_server())
            queue = QueueConfig(url=sqs.make(), results=redis.url)
        logs = Path(folder, "logs")
        logs.mkdir()
        options = ["--pause", str(pause_s), "--sabotage", sabotaged]
        loop = Loop(redis, queue, logs, seed, kinds, options)
        try:
            for role, count in (("enqueuer", ENQUEUERS), ("worker", WORKERS)):
                for _ in range(count):
                    loop.start(role)
            time.sleep(1.0)
            while loop.faults.total() < faults or len(loop.lines("enqueuer")) < jobs:
                if loop.faults.total() < faults:
                    loop.strike()
                time.sleep(0.3)
                loop.wake()
            loop.stop("enqueuer")
            while loop.wake():
                time.sleep(0.1)
            return _check(loop, open_store(redis.url, ""), end_s)
        finally:
            loop.stop("enqueuer")
            loop.stop("worker")


def _check(loop: Loop, store: RedisStore, end_s: float) -> Report:
    accepted = loop.lines("enqueuer")
    deadline = time.monotonic() + end_s
    while any(c.status in ("queued", "in_progress") for c in store.counts()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    time.sleep(0.5)  # for the last lines of the logs
    ended = [line.split() for line in loop.lines("worker")]
    told = Counter(name for name, _ in ended)
    wrong = [f"{name} was ended {count} times" for name, count in told.items() if count > 1]
    silent = 0
    for name in accepted:
        job, records = store.read(name, 0)
        silent += job is not None and job.request == b"silent"
        problem = problem_of(job, records)
        if problem:
            wrong.append(f"{name}: {problem}")
    for name, fence in ended:
        job = store.get(name)
        if job is None or job.result != fence.encode():
            wrong.append(f"{name}: ended by {fence}, but the store has {job and job.result!r}")
    store.close()
    return Report(len(accepted), silent, loop.faults, wrong)


def problem_of(job: Job | None, records: list[bytes]) -> str:
    """What is wrong with a job that should have been completed, or nothing. Its last lease ended
    it, and no record comes from a lease before that of the record before it."""
    if job is None or job.status != "completed":
        return f"it is {job and job.status}: {job and job.result!r}"
    written = [tuple(map(int, record.split())) for record in records]
    if [i for i, _ in written] != list(range(RECORDS)):
        return f"its records are {records}"
    fences = [fence for _, fence in written] + [int(job.result)]
    if fences != sorted(fences) or fences[-1] != job.fence:
        return f"leases {fences[:-1]} wrote, {fences[-1]} ended it, {job.fence} had it"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["enqueuer", "worker"], help=argparse.SUPPRESS)
    parser.add_argument("url", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("log", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", default="", help=argparse.SUPPRESS)
    parser.add_argument("--queue", choices=["redis", "sqs"], default="redis")
    parser.add_argument("--pause", type=float, default=0.005, help="seconds between two jobs")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--sabotage", choices=["", *SABOTAGE], default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.role == "enqueuer":
        enqueue(open_store(args.url, args.results), args.log, args.pause)
    elif args.role == "worker":
        sabotage(args.sabotage)
        work(open_store(args.url, args.results), args.log)
    else:
        started = time.monotonic()
        report = run(args.jobs, args.faults, args.seed, args.pause, args.queue)
        print(*report.wrong[:20], sep="\n")
        print(
            f"{report.accepted} jobs accepted, {report.silent} of them silent; "
            f"{report.faults.total()} faults: {dict(sorted(report.faults.items()))}; "
            f"{time.monotonic() - started:.0f} s: {len(report.wrong)} wrong"
        )
        return 1 if report.wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
