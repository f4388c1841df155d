"""How batches end when something is in the way: their input goes, or the store does."""

import contextlib
import json
import os
import threading
import time

import pytest

from nanogpt.api.jobs.batches import custom_request_id
from nanogpt.jobs.files import Files
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.store import StoreUnavailable
from nanogpt.jobs_config import JobsConfig
from tests.app_utils import make_app, official_client
from tests.fake_cluster import FakeCluster, play
from tests.jobs_utils import jobs_app, wait_for
from tests.redis_server import redis_server
from tests.test_jobs_files import begin_batch, finished, line, lines_of, silent_after


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch):
    monkeypatch.setattr("nanogpt.jobs.runner.RETRY_S", 0.01)


def wait_for_lines(client, batch, count: int) -> None:
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == count)


def assert_input_gone(batch) -> None:
    assert (batch.status, [e.code for e in batch.errors.data]) == ("failed", ["input_file_gone"])


@contextlib.contextmanager
def without_input(directory, lines: int, answered: int):
    """A client, and a batch that has so many lines done, the others under way, and no input."""
    cluster = FakeCluster()
    cluster.script = silent_after(answered, cluster)
    with jobs_app(directory, cluster) as app:
        client = official_client(app, "none")
        batch = begin_batch(client, [line(i) for i in range(lines)])
        wait_for_lines(client, batch, answered)
        client.files.delete(batch.input_file_id)
        yield client, batch


def test_an_input_that_goes_in_the_middle_leaves_the_results_so_far(tmp_path):
    """The batch failed without a word, and its results were nowhere."""
    with without_input(tmp_path, 10, answered=4) as (_, batch):
        pass
    second = FakeCluster()
    with jobs_app(tmp_path, second) as app:
        client = official_client(app, "none")
        done = finished(client, batch.id)
        assert_input_gone(done)
        assert len(lines_of(client, done.output_file_id)) == 4
        assert done.error_file_id is None
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (10, 4, 0)
        assert not second.handles


def test_a_cancelled_batch_whose_input_is_gone_is_cancelled(tmp_path):
    with without_input(tmp_path, 3, answered=1) as (client, batch):
        client.batches.cancel(batch.id)
        done = finished(client, batch.id)
        assert done.status == "cancelled"
        assert [e.code for e in done.errors.data] == ["input_file_gone"]
        assert len(lines_of(client, done.output_file_id)) == 1


def test_each_attempt_at_a_line_is_another_request_for_the_engines(tmp_path):
    """One that an attempt gave up may still be ending when the next one begins; in the output a
    line has one id."""
    first, second = FakeCluster(), FakeCluster()
    first.script = lambda request: []
    with jobs_app(tmp_path, first) as app:
        client = official_client(app, "none")
        batch = begin_batch(client, [line(i) for i in range(3)])
        wait_for(lambda: len(first.handles) == 3)
    with jobs_app(tmp_path, second) as app:
        client = official_client(app, "none")
        done = finished(client, batch.id)
        names = {h.request.request_id for h in first.handles + second.handles}
        assert len(names) == 6
        output = lines_of(client, done.output_file_id).values()
        assert {x["id"] for x in output} == {custom_request_id(batch.id, i) for i in (1, 2, 3)}


@contextlib.contextmanager
def redis_app(directory, cluster: FakeCluster, config: JobsConfig):
    with redis_server(directory / "redis") as server:
        store = RedisStore(server.url, max_queued=100, max_bytes=10**9)
        app = make_app(cluster, jobs=(store, directory, config), clock=time.time)
        try:
            yield app
        finally:
            app.extensions["nanogpt"].close()


def test_lines_that_run_when_their_input_goes_are_finished(tmp_path):
    """In Redis, where what is open can be deleted."""
    answer, is_deleted = play([b"hello"]), threading.Event()

    def script(request):
        assert is_deleted.wait(60)
        return answer(request)

    cluster = FakeCluster(script)
    with redis_app(tmp_path, cluster, JobsConfig(max_batch_choices=1)) as app:
        client = official_client(app, "none")
        lines = [json.dumps(line(i)).encode() + b" " * 700_000 for i in range(8)]
        batch = begin_batch(client, lines)
        wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
        client.files.delete(batch.input_file_id)
        is_deleted.set()
        done = finished(client, batch.id)
        assert_input_gone(done)
        output = lines_of(client, done.output_file_id)
        assert 0 < len(output) == done.request_counts.completed == len(cluster.handles) < 8


def test_who_writes_the_files_again_runs_no_line_and_changes_nothing(tmp_path, monkeypatch):
    """What an earlier attempt had written was counted once more."""
    add, added = Files.add, []

    def add_and_fail(files, *arguments, **more):
        job = add(files, *arguments, **more)
        added.append(job.id)
        if len(added) == 1:
            raise StoreUnavailable("the disk is full")
        return job

    cluster = FakeCluster()
    cluster.script = silent_after(2, cluster)
    with jobs_app(tmp_path, cluster) as app:
        client = official_client(app, "none")
        batch = begin_batch(client, [line(i) for i in range(5)])
        wait_for_lines(client, batch, 2)
        monkeypatch.setattr(Files, "add", add_and_fail)
        client.batches.cancel(batch.id)
        done = finished(client, batch.id)
        assert done.status == "cancelled"
        assert added == [done.output_file_id, done.output_file_id, done.error_file_id]
        assert len(lines_of(client, done.output_file_id)) == 2
        assert len(lines_of(client, done.error_file_id)) == 3
        assert len(cluster.handles) == 5
        contents = app.extensions["nanogpt"].companion._contents
        sizes = [os.path.getsize(path) for path in (tmp_path / "files").iterdir()]
        assert contents._used() == sum(sizes)
