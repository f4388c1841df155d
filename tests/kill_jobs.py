"""Kills enqueuers, workers and Redis for a while, and looks whether any job was lost or done twice.

    python -m tests.kill_jobs --jobs 10000 --kills 500        some minutes; the short one is a test
    python -m tests.kill_jobs --queue sqs                     messages in a stand-in for SQS

Every process has a log to which it adds a line when the store has told it that something is done.
What a log says is compared with what Redis has at the end.
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
from pathlib import Path
from typing import NamedTuple

from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.runner import Lease, Runner
from nanogpt.jobs.shared import open_shared
from nanogpt.jobs.store import Job, StoreUnavailable
from nanogpt.jobs_config import JobsConfig, QueueConfig
from tests.redis_server import RedisServer, redis_server
from tests.sqs_server import CREDENTIALS, sqs_server

RECORDS = 5
LEASE_S = 1.5
ENQUEUERS, WORKERS = 2, 3
END_S = 120  # for what was accepted to be done, once nothing is killed any more


def open_store(url: str, results: str) -> RedisStore:
    return open_shared(QueueConfig(url=url, results=results), JobsConfig(max_queued=10**6))


def enqueue(store: RedisStore, log: Path, pause_s: float) -> None:
    """Puts jobs for ever; those that were accepted are in the log."""
    with log.open("a", buffering=1) as file:
        for i in range(10**9):
            name = f"{log.stem}-{i}"
            job = Job(
                id=name, kind="completion", owner="o", created=time.time(), request=b"", keep_s=1e6
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
                while True:
                    try:
                        lease.append([str(i).encode()])
                        break
                    except StoreUnavailable:
                        time.sleep(0.05)
                time.sleep(0.002)
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


class Report(NamedTuple):
    accepted: int
    ended: int  # of them, as somebody was told
    kills: Counter[str]
    wrong: list[str]


class Loop:
    """The processes, and what is done to them."""

    def __init__(
        self, redis: RedisServer, queue: QueueConfig, directory: Path, pause_s: float, seed: int
    ) -> None:
        self._redis, self._queue = redis, queue
        self._directory, self._pause_s = directory, pause_s
        self._random = random.Random(seed)
        self._started = 0
        self._alive: dict[str, list[tuple[subprocess.Popen[bytes], Path]]] = {}
        self.kills: Counter[str] = Counter()

    def start(self, role: str) -> None:
        self._started += 1
        log = self._directory / f"{role}{self._started}"
        command = [sys.executable, "-m", "tests.kill_jobs", role, self._queue.url, str(log)]
        options = ["--pause", str(self._pause_s), "--results", self._queue.results]
        process = subprocess.Popen([*command, *options], env={**os.environ, **CREDENTIALS})
        self._alive.setdefault(role, []).append((process, log))

    def kill_one(self) -> None:
        """And start another in its place. Nothing, when all of the chosen kind are still starting:
        killing those proves nothing."""
        role = self._random.choices(["work", "enqueue", "redis"], [6, 3, 2])[0]
        if role == "redis":
            self.kills[role] += 1
            self._redis.kill()
            time.sleep(self._random.random() / 5)
            self._redis.start()
            return
        started = [pair for pair in self._alive[role] if pair[1].exists()]
        if started:
            victim = self._random.choice(started)
            self._alive[role].remove(victim)
            self._end(victim[0])
            self.kills[role] += 1
            self.start(role)

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


def run(jobs: int, kills: int, seed: int, pause_s: float = 0.005, kind: str = "redis") -> Report:
    """Until so many jobs were accepted and so many processes killed, and all is done."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        redis = stack.enter_context(redis_server(Path(folder, "redis")))
        queue = QueueConfig(url=redis.url)
        if kind == "sqs":
            sqs = stack.enter_context(sqs_server())
            queue = QueueConfig(url=sqs.make(), results=redis.url)
        logs = Path(folder, "logs")
        logs.mkdir()
        loop = Loop(redis, queue, logs, pause_s, seed)
        try:
            for role, count in (("enqueue", ENQUEUERS), ("work", WORKERS)):
                for _ in range(count):
                    loop.start(role)
            time.sleep(1.0)
            while loop.kills.total() < kills or len(loop.lines("enqueue")) < jobs:
                loop.kill_one()
                time.sleep(0.3)
            loop.stop("enqueue")
            return _check(loop, open_store(redis.url, ""))
        finally:
            loop.stop("enqueue")
            loop.stop("work")


def _check(loop: Loop, store: RedisStore) -> Report:
    accepted = loop.lines("enqueue")
    deadline = time.monotonic() + END_S
    while any(c.status in ("queued", "in_progress") for c in store.counts()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    time.sleep(0.5)  # for the last lines of the logs
    ended = [line.split() for line in loop.lines("work")]
    told = Counter(name for name, _ in ended)
    wrong = [f"{name} was ended {count} times" for name, count in told.items() if count > 1]
    expected = [str(i).encode() for i in range(RECORDS)]
    for name in accepted:
        job, records = store.read(name, 0)
        if job is None or job.status != "completed" or records != expected:
            wrong.append(f"{name}: {job and job.status} {job and job.result!r} {records}")
    for name, fence in ended:
        job = store.get(name)
        if job is None or job.result != fence.encode():
            wrong.append(f"{name}: ended by {fence}, but the store has {job and job.result!r}")
    store.close()
    return Report(len(accepted), len(told), loop.kills, wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["enqueue", "work"], help=argparse.SUPPRESS)
    parser.add_argument("url", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("log", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", default="", help=argparse.SUPPRESS)
    parser.add_argument("--queue", choices=["redis", "sqs"], default="redis")
    parser.add_argument("--pause", type=float, default=0.005, help="seconds between two jobs")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.role == "enqueue":
        enqueue(open_store(args.url, args.results), args.log, args.pause)
    elif args.role == "work":
        work(open_store(args.url, args.results), args.log)
    else:
        started = time.monotonic()
        report = run(args.jobs, args.kills, args.seed, args.pause, args.queue)
        print(*report.wrong[:20], sep="\n")
        print(
            f"{report.accepted} jobs accepted, {dict(report.kills)} killed in "
            f"{time.monotonic() - started:.0f} s: {len(report.wrong)} wrong"
        )
        return 1 if report.wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
