"""A worker that stands still, and a Redis that is away for a moment, cost nobody anything."""

import threading
import time

import pytest

from nanogpt.api.jobs import relay
from nanogpt.config import HttpConfig
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.runner import Lease
from nanogpt.request import GenerateRequest
from nanogpt.sampling_params import SamplingParams
from tests.fake_cluster import INFO, FakeCluster
from tests.jobs_utils import jobs_app, wait_for
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


REQUEST = GenerateRequest(
    request_id="r",
    model=INFO.name,
    prompts=((1,),),
    n=1,
    params=SamplingParams(max_tokens=11, seed=1),
)


@pytest.mark.parametrize(("drain_s", "status"), [(60.0, "completed"), (0.2, "in_progress")])
def test_a_drained_worker_finishes_what_clients_wait_for_elsewhere(tmp_path, drain_s, status):
    """No client is connected to it; what takes longer than it has goes back."""
    cluster = FakeCluster()
    cluster.delay_s = 0.1
    with jobs_app(tmp_path, cluster, settings=HttpConfig(drain_s=drain_s)) as app:
        service = app.extensions["nanogpt"]
        store = service.companion._store
        relay.submit(store, REQUEST, INFO, time.time())
        wait_for(lambda: cluster.handles)
        service.drain()
        assert service.places.are_free
        assert not service.is_drained()
        wait_for(service.is_drained)
        assert store.get("r").status == status
