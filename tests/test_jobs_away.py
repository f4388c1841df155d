"""A worker that stands still, and a Redis that is away for a moment, cost nobody anything."""

import threading
import time

import pytest

from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.runner import Lease
from tests.jobs_utils import wait_for
from tests.redis_server import redis_server
from tests.test_jobs_runner import ended, finish, running
from tests.test_jobs_store import job


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


def open_store(server, namespace: str) -> RedisStore:
    return RedisStore(server.url, max_queued=1000, max_bytes=10**9, namespace=namespace)


def test_a_worker_that_stood_still_while_it_waited_keeps_its_jobs(server, monkeypatch):
    """For longer than its leases: it renews them before it claims again."""
    store, go_on, stand_still = open_store(server, "pause"), threading.Event(), threading.Event()
    wait, lease_s = store._wait, 0.6

    def wait_long(*arguments) -> None:
        wait(*arguments)
        if stand_still.is_set():
            time.sleep(2 * lease_s)
            stand_still.clear()

    def silent(lease: Lease) -> None:
        go_on.wait(60)
        finish(lease)

    monkeypatch.setattr(store, "_wait", wait_long)
    with running(store, silent, lease_s=lease_s):
        store.put(job("j"))
        wait_for(lambda: store.get("j").status == "in_progress")
        stand_still.set()
        wait_for(lambda: not stand_still.is_set())
        time.sleep(lease_s / 2)
        assert store.get("j").fence == 1
        go_on.set()
        assert ended(store, "j").status == "completed"
    store.close()
