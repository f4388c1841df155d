"""What only the store in Redis does: it outlives Redis, and a write whose answer is lost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanogpt.errors import ConfigError
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.redis_link import MaybeDone
from nanogpt.jobs.store import Job, Lane, StoreUnavailable
from nanogpt.network import free_port
from tests import kill_jobs
from tests.redis_server import redis_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


def open_store(url: str, namespace: str) -> RedisStore:
    return RedisStore(url, max_queued=10_000, max_bytes=10**9, namespace=namespace)


def job(name: str) -> Job:
    return Job(id=name, kind="completion", owner="a", created=0.0, request=b"", keep_s=100.0)


def test_leases_run_out_by_the_clock_of_redis(server):
    store = open_store(server.url, "clock")
    store.put(job("j"))
    first = store.claim(Lane.BATCH, 0.3, 0.0)
    assert store.claim(Lane.BATCH, 0.3, 0.0) is None
    assert abs(first.started - time.time()) < 3600
    time.sleep(0.4)
    assert store.claim(Lane.BATCH, 0.3, 0.0).fence == first.fence + 1
    store.close()


def test_a_write_whose_answer_is_lost_is_done_once(server, monkeypatch):
    store = open_store(server.url, "answers")
    send, lose = store.link.commands, [False]

    def commands(*given):
        answers = send(*given)
        if lose[0]:
            lose[0] = False
            raise MaybeDone("the connection broke")
        return answers

    store.put(job("warm-up"))
    monkeypatch.setattr(store.link, "commands", commands)
    lose[0] = True
    assert store.put(job("j")).id == "j"
    store.cancel("warm-up")
    held = store.claim(Lane.BATCH, 30.0, 0.0)
    lose[0] = True
    assert store.append("j", held.fence, [b"0", b"1"]) == "held"
    assert store.append("j", held.fence, [b"2"]) == "held"
    lose[0] = True
    assert store.complete("j", held.fence, "completed", b"r", records=[b"3"])
    assert not lose[0]
    assert store.read("j", 0)[1] == [b"0", b"1", b"2", b"3"]
    assert not store.complete("j", held.fence, "failed", b"late")
    store.close()


def test_who_cannot_know_what_was_written_loses_the_lease(server, monkeypatch):
    """It must not write the same again, nor go on as if it were there."""
    monkeypatch.setattr("nanogpt.jobs.redis.SURE_S", 0.2)
    store = open_store(server.url, "unsure")
    store.put(job("j"))
    held = store.claim(Lane.BATCH, 30.0, 0.0)

    def commands(*given):
        raise MaybeDone("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(store.link, "commands", commands)
        assert store.append("j", held.fence, [b"0"]) == "lost"
        assert not store.complete("j", held.fence, "completed", b"")
        with pytest.raises(StoreUnavailable):
            store.put(job("other"))
    store.close()


def test_redis_that_is_away_is_said_at_once():
    store = open_store(f"redis://127.0.0.1:{free_port()}/0", "away")
    for attempt in (
        lambda: store.put(job("j")),
        lambda: store.claim(Lane.BATCH, 30.0, 5.0),
        lambda: store.append("j", 1, [b""]),
        lambda: store.read("j", 0, 5.0),
        lambda: store.counts(),
    ):
        with pytest.raises(StoreUnavailable, match="the queue can't be used now") as error:
            attempt()
        assert error.value.headers["Retry-After"]


def test_a_full_redis_refuses_and_goes_on(server):
    store = open_store(server.url, "full")
    store.put(job("before"))
    store.link.command("CONFIG", "SET", "maxmemory", "1mb")
    try:
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            store.put(job("j"))
        assert store.get("before").status == "queued"
    finally:
        store.link.command("CONFIG", "SET", "maxmemory", "0")
    assert store.get("j") is None
    store.put(job("j"))
    store.close()


def test_a_redis_that_may_lose_the_last_second_is_known(server):
    store = open_store(server.url, "durable")
    assert store.is_durable()
    store.link.command("CONFIG", "SET", "appendfsync", "everysec")
    try:
        assert not store.is_durable()
    finally:
        store.link.command("CONFIG", "SET", "appendfsync", "always")
        store.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis//x", ""])
def test_a_wrong_url_is_named_without_its_password(url):
    with pytest.raises(ConfigError, match=r"queue\.url must be redis://"):
        open_store(url, "n")


JOBS, RECORDS, KILLS = 60, 5, 4


def keep_trying(action, *arguments):
    while True:
        try:
            return action(*arguments)
        except StoreUnavailable:
            time.sleep(0.02)


def test_nothing_is_lost_or_doubled_when_redis_is_killed(tmp_path):
    """Accepted jobs end once each, with each record once, while Redis is killed with SIGKILL and
    started again; workers give up jobs in between."""
    with redis_server(tmp_path / "redis") as server:
        store = open_store(server.url, "kills")
        accepted: list[str] = []
        ended: list[tuple[str, bytes]] = []
        stop = threading.Event()

        def enqueue(name: str) -> None:
            try:
                store.put(job(name))
            except StoreUnavailable:
                return
            accepted.append(name)

        def work(worker: int) -> None:
            while not stop.is_set():
                held = keep_trying(store.claim, Lane.BATCH, 1.0, 0.1)
                if held is None or not carry_out(held, worker):
                    continue
                result = f"{held.id} by {held.fence}".encode()
                if keep_trying(store.complete, held.id, held.fence, "completed", result):
                    ended.append((held.id, result))

        def carry_out(held: Job, worker: int) -> bool:
            have = len(keep_trying(store.read, held.id, 0)[1])
            for i in range(have, RECORDS):
                record = str(i).encode()
                if keep_trying(store.append, held.id, held.fence, [record]) == "lost":
                    return False
                if (held.fence + i + worker) % 7 == 0:
                    return False  # this one dies here
            return True

        with ThreadPoolExecutor(10) as pool:
            for worker in range(4):
                pool.submit(work, worker)
            puts = []
            for kill in range(KILLS):
                names = [f"j{i}" for i in range(kill * 15, kill * 15 + 15)]
                puts += [pool.submit(enqueue, name) for name in names]
                time.sleep(0.3)
                server.kill()
                time.sleep(0.1)
                server.start()
            for put in puts:
                put.result()
            deadline = time.monotonic() + 60
            while {name for name, _ in ended} < set(accepted) and time.monotonic() < deadline:
                time.sleep(0.05)
            stop.set()
        assert len(accepted) > JOBS // 2
        assert {name for name, _ in ended} >= set(accepted)
        assert len(ended) == len(dict(ended)), "ended twice"
        for name, result in ended:
            found, records = store.read(name, 0)
            assert (found.status, found.result) == ("completed", result)
            assert records == [str(i).encode() for i in range(RECORDS)]
        store.close()


# The stand-in for SQS takes some thirty messages a second.
KILL_RUNS = {
    "redis": {"jobs": 100, "faults": 12, "pause_s": 0.005},
    "sqs": {"jobs": 30, "faults": 16, "pause_s": 0.2, "kind": "sqs"},
    "fences": {"jobs": 40, "faults": 8, "kinds": ["stop worker"], "end_s": 5},
    "renewal": {"jobs": 40, "faults": 0, "kinds": [], "end_s": 5},
}
# What is put into the workers, and the words by which it is found.
BUGS = {"fences": "had it", "renewal": "in_progress"}


@pytest.fixture(scope="module")
def kill_runs():
    """All of them, on their way: they mostly wait."""
    with ThreadPoolExecutor(len(KILL_RUNS)) as pool:
        yield {
            name: pool.submit(kill_jobs.run, seed=1, sabotaged=name if name in BUGS else "", **more)
            for name, more in KILL_RUNS.items()
        }


@pytest.mark.parametrize("kind", ["redis", "sqs"])
def test_enqueuers_workers_and_redis_may_all_be_killed(kind, kill_runs):
    """The short form of python -m tests.kill_jobs."""
    report = kill_runs[kind].result()
    assert report.wrong == []
    assert report.accepted >= KILL_RUNS[kind]["jobs"]
    assert report.silent > 0
    assert report.faults.total() >= KILL_RUNS[kind]["faults"]
    assert report.faults["stop worker"] > 0


@pytest.mark.parametrize(("bug", "words"), BUGS.items())
def test_a_bug_in_leases_is_found_by_stopping_workers_and_by_silent_jobs(bug, words, kill_runs):
    """Workers whose late writes are accepted, or who don't renew their leases."""
    assert words in " ".join(kill_runs[bug].result().wrong)
