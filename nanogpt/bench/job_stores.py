"""Stores of jobs, as fast as threads of one process can use them."""

import contextlib
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from nanogpt import process
from nanogpt.errors import StartupError
from nanogpt.jobs.redis_link import Link
from nanogpt.jobs.shared import open_shared
from nanogpt.jobs.sqlite import open_store
from nanogpt.jobs.store import Job, Lane, Store, StoreUnavailable
from nanogpt.jobs_config import JobsConfig, QueueConfig
from nanogpt.network import free_port

REQUEST_BYTES = 1000  # a plan with a prompt of 200 tokens
LEASE_S = 30.0
START_S = 30.0
CONFIG = JobsConfig(max_queued=1_000_000)
# The stand-in for SQS takes any; boto3 would look for a role of the machine otherwise.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}


class StoreRates(msgspec.Struct, frozen=True, kw_only=True):
    """Operations a second of one store, by so many threads together."""

    store: str
    threads: int
    puts: float
    gets: float
    done: float  # claimed and completed


def measure(name: str, store: Store, threads: int, seconds: float) -> StoreRates:
    """Each kind of operation for so long. Raises StoreUnavailable."""
    ids: list[str] = []

    def put() -> None:
        name = secrets.token_hex(12)
        store.put(
            Job(
                id=name,
                kind="completion",
                owner="bench",
                created=time.time(),
                request=bytes(REQUEST_BYTES),
                keep_s=3600.0,
            )
        )
        ids.append(name)

    def get() -> None:
        store.get(secrets.choice(ids))

    def carry_out() -> None:
        held = None
        while held is None:
            held = store.claim(Lane.BATCH, LEASE_S, 1.0)
        store.complete(held.id, held.fence, "completed", b"")

    def rate(action: Callable[[], None], most: int | None = None) -> float:
        return _rate(action, threads, seconds, most)

    puts = rate(put)
    return StoreRates(
        store=name, threads=threads, puts=puts, gets=rate(get), done=rate(carry_out, len(ids))
    )


def _rate(action: Callable[[], None], threads: int, seconds: float, most: int | None) -> float:
    """How often a second. `most` times altogether at the most."""
    end = time.monotonic() + seconds
    share = None if most is None else most // threads
    counts, errors = [0] * threads, []

    def work(thread: int) -> None:
        try:
            while time.monotonic() < end and (share is None or counts[thread] < share):
                action()
                counts[thread] += 1
        except Exception as error:
            errors.append(error)

    started = time.monotonic()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.monotonic() - started)


@contextlib.contextmanager
def opened(name: str, folder: Path, queue: QueueConfig | None) -> Iterator[Store]:
    """The store, closed in the end. `queue`: None for SQLite."""
    store = open_store(CONFIG, folder / name) if queue is None else open_shared(queue, CONFIG)
    try:
        yield store
    finally:
        store.close()


# What they need


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[QueueConfig]:
    """A Redis that flushes every write. Raises StartupError."""
    if shutil.which("redis-server") is None:
        raise StartupError("redis-server is not installed (on Debian: apt install redis-server)")
    folder.mkdir(exist_ok=True)
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    url = f"redis://127.0.0.1:{port}/0"
    with _running(command, lambda: _ping(url)):
        yield QueueConfig(url=url)


def _ping(url: str) -> bool:
    link = Link(url)
    try:
        return bool(link.command("PING"))
    except StoreUnavailable:
        return False
    finally:
        link.close()


@contextlib.contextmanager
def sqs(results: QueueConfig) -> Iterator[QueueConfig]:
    """A stand-in for SQS, in memory: what it costs says little of Amazon's. Needs CREDENTIALS in
    the environment. Raises StartupError."""
    try:
        import boto3
        import moto.server  # noqa: F401
    except ImportError as error:
        raise StartupError("boto3 and moto[server] are not installed") from error
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    client = boto3.client("sqs", endpoint_url=endpoint, region_name="eu-west-1")

    def make() -> bool:
        with contextlib.suppress(Exception):  # it is not up yet
            for lane in Lane:
                client.create_queue(QueueName=f"bench-{lane.name.lower()}")
            return True
        return False

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, make):
        url = f"sqs+http://127.0.0.1:{port}/123456789012/bench?region=eu-west-1"
        yield QueueConfig(url=url, results=results.url)


@contextlib.contextmanager
def _running(command: list[str], is_up: Callable[[], bool]) -> Iterator[None]:
    with open("/dev/null", "wb") as nowhere:
        started = process.start_below(command, {**os.environ, **CREDENTIALS}, output=nowhere)
    try:
        deadline = time.monotonic() + START_S
        while not is_up():
            if started.poll() is not None or time.monotonic() > deadline:
                raise StartupError(f"{' '.join(command[:3])} did not start")
            time.sleep(0.1)
        yield
    finally:
        started.kill()
        started.wait()
