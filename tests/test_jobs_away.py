"""A worker that stands still, and a Redis that is away for a moment, cost nobody anything."""

import json
import threading
import time

import pytest

from nanogpt.api.jobs.follow import POLL_S
from nanogpt.api.response import PING
from nanogpt.config import HttpConfig
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.runner import Lease
from nanogpt.jobs_config import JobsConfig
from tests.app_utils import complete, make_app
from tests.fake_cluster import FakeCluster
from tests.jobs_utils import WAIT_S, jobs_app, wait_for
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


@pytest.mark.parametrize(("drain_s", "status"), [(60.0, "completed"), (0.2, "in_progress")])
def test_a_drained_worker_finishes_what_clients_wait_for_elsewhere(tmp_path, drain_s, status):
    """No client is connected to it; what takes longer than it has goes back."""
    cluster = FakeCluster()
    cluster.delay_s = 0.1
    with jobs_app(tmp_path, cluster, settings=HttpConfig(drain_s=drain_s)) as app:
        service = app.extensions["nanogpt"]
        answer = complete(app.test_client(), {"Idempotency-Key": "one"}, max_tokens=11, stream=True)
        wait_for(lambda: cluster.handles)
        answer.close()
        service.drain()
        assert service.places.are_free
        assert not service.is_drained()
        wait_for(service.is_drained)
        job_id = answer.headers["Location"].rpartition("/")[2]
        assert service.companion._store.get(job_id).status == status


class Away:
    """The application on Redis, and requests under an Idempotency-Key."""

    def __init__(self, server, app, cluster) -> None:
        self._server, self._app, self.cluster = server, app, cluster

    def ask(self, **fields):
        return complete(
            self._app.test_client(), {"Idempotency-Key": "one"}, max_tokens=11, seed=1, **fields
        )

    def restart_redis(self) -> None:
        """It is away for longer than one read waits, so that it is asked while it is."""
        self._server.kill()
        time.sleep(1.5 * POLL_S)
        self._server.start()


@pytest.fixture
def away(server, tmp_path):
    cluster = FakeCluster()
    cluster.delay_s = 0.1
    jobs = (open_store(server, tmp_path.name), tmp_path, JobsConfig())
    app = make_app(cluster, jobs=jobs, clock=time.time)
    try:
        yield Away(server, app, cluster)
    finally:
        app.extensions["nanogpt"].close()


def test_a_kept_stream_outlives_its_redis(away):
    pieces = away.ask(stream=True).iter_encoded()
    got = [next(piece for piece in pieces if piece.startswith(b"data: "))]
    restarting = threading.Thread(target=away.restart_redis)
    restarting.start()
    got += pieces
    restarting.join()
    assert PING in got  # while nothing can be known, as at other times without news
    events = [e for e in b"".join(got).decode().split("\n\n") if e.startswith("data: ")]
    assert events.pop() == "data: [DONE]"
    text = "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events)
    assert text == "hello world"


def test_a_kept_call_outlives_its_redis(away):
    found = []
    asking = threading.Thread(target=lambda: found.append(away.ask()))
    asking.start()
    wait_for(lambda: away.cluster.handles)
    away.restart_redis()
    asking.join(WAIT_S)
    assert found[0].status_code == 200, found[0].json
    assert found[0].json["choices"][0]["text"] == "hello world"
