"""The runner: what it claims and when, what it does with jobs that fail, and how it lets go."""

import contextlib
import threading
import time

import pytest

from nanogpt.errors import Unavailable
from nanogpt.jobs import runner as runner_module
from nanogpt.jobs.runner import MAX_BATCHES, MAX_TRIES, Lease, LeaseLost, Runner
from nanogpt.jobs.sqlite import SqliteStore
from nanogpt.jobs.store import Lane
from tests.jobs_utils import wait_for
from tests.test_jobs_store import job


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "RETRY_S", 0.02)
    store = SqliteStore(tmp_path, max_queued=1000, max_bytes=10**9)
    yield store
    store.close()


@contextlib.contextmanager
def running(store, execute, *, room=4, ready=lambda: True, size=1, **more):
    runner = Runner(
        store,
        {"completion": execute},
        ready=ready,
        size=size if callable(size) else lambda job: size,
        room=room,
        failed=lambda job, error: repr(error).encode(),
        **more,
    )
    runner.start()
    try:
        yield runner
    finally:
        runner.close()


def finish(lease: Lease) -> None:
    lease.complete("completed", b"done")


def wait_until_told(lease: Lease) -> None:
    """Works until it is cancelled, or must let go."""
    while not lease.cancelled:
        lease.check()
        time.sleep(0.01)
    lease.complete("cancelled", b"")


def ended(store, name: str):
    return wait_for(lambda: (found := store.get(name)).ended and found)


def test_jobs_are_done(store):
    with running(store, finish):
        for i in range(20):
            store.put(job(f"j{i}"))
        assert {ended(store, f"j{i}").result for i in range(20)} == {b"done"}


def test_nothing_is_claimed_before_the_cluster_is_ready(store):
    is_ready = threading.Event()
    with running(store, finish, ready=is_ready.is_set):
        store.put(job("j"))
        time.sleep(0.3)
        assert store.get("j").status == "queued"
        is_ready.set()
        ended(store, "j")


def test_only_what_there_is_room_for_is_claimed_but_those_who_wait_always(store):
    with running(store, wait_until_told, room=2):
        for i in range(4):
            store.put(job(f"j{i}"))
        wait_for(lambda: store.get("j1").status == "in_progress")
        for i in range(4):
            store.put(job(f"now{i}", lane=Lane.NOW))
        wait_for(lambda: store.get("now3").status == "in_progress")
        assert [store.get(f"j{i}").status for i in range(4)] == [
            *["in_progress"] * 2,
            *["queued"] * 2,
        ]
        store.cancel("j0")
        wait_for(lambda: store.get("j2").status == "in_progress")


def test_a_few_batches_at_once(store):
    with running(store, wait_until_told, size=0):
        for i in range(MAX_BATCHES + 1):
            store.put(job(f"b{i}", lane=Lane.BATCH))
        wait_for(lambda: store.get(f"b{MAX_BATCHES - 1}").status == "in_progress")
        store.put(job("j"))
        wait_for(lambda: store.get("j").status == "in_progress")
        assert store.get(f"b{MAX_BATCHES}").status == "queued"


def test_an_error_ends_the_job_as_failed(store):
    def fail(lease: Lease) -> None:
        raise ValueError("no")

    with running(store, fail):
        store.put(job("j"))
        found = ended(store, "j")
        assert (found.status, found.result) == ("failed", b"ValueError('no')")


def test_what_is_unavailable_is_tried_again(store):
    attempts = []

    def fail_at_first(lease: Lease) -> None:
        attempts.append(1)
        if len(attempts) < MAX_TRIES + 3:  # being put back is no failed try
            raise Unavailable("full")
        finish(lease)

    with running(store, fail_at_first):
        store.put(job("j"))
        assert ended(store, "j").status == "completed"


def test_a_job_that_ends_its_worker_is_given_up(store):
    """Claimed again and again without progress: somebody has to stop it."""
    store.put(job("j"))
    for _ in range(MAX_TRIES):
        store.claim(Lane.BATCH, 0.0, 0.0)
    with running(store, finish):
        found = ended(store, "j")
        assert found.status == "failed"
        assert b"without any progress" in found.result


def test_a_lost_lease_writes_nothing(store):
    lost, seen = threading.Event(), []

    def slow(lease: Lease) -> None:
        lost.wait(60)
        with pytest.raises(LeaseLost):
            lease.append([b"late"])
        try:
            lease.complete("failed", b"late")
        except LeaseLost:
            seen.append("lost")
            raise

    with running(store, slow, room=1):  # so that it claims no other in the background
        store.put(job("j"))
        wait_for(lambda: store.get("j").status == "in_progress")
        store.renew({"j": 1}, 0.0)  # as if it had run out
        another = store.claim(Lane.BATCH, 30.0, 0.0)
        store.complete("j", another.fence, "completed", b"done")
        lost.set()
        wait_for(lambda: seen)
    assert store.get("j").result == b"done"
    assert store.read("j", 0)[1] == []


def test_a_job_that_its_own_worker_claims_again_runs_once_at_a_time_and_is_renewed(
    tmp_path, monkeypatch
):
    """The clock jumps beyond the lease: the old attempt notices that it has lost, then the new one
    begins, whose lease is renewed although the old one ends after it was claimed."""
    ahead_s, lease_s = [0.0], 0.6
    store = SqliteStore(
        tmp_path, max_queued=10, max_bytes=10**9, clock=lambda: time.time() + ahead_s[0]
    )
    at_once, fences, notice, go_on = [0, 0], [], threading.Event(), threading.Event()
    claim = store.claim

    def claim_late(*arguments):
        if fences:
            ahead_s[0] = 3600.0  # between the renewal and the claim
        return claim(*arguments)

    def silent(lease: Lease) -> None:
        fences.append(lease.job.fence)
        at_once[0] += 1
        at_once[1] = max(at_once)
        try:
            (go_on if lease.job.fence > 1 else notice).wait(60)
            lease.check()
            finish(lease)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(store, "claim", claim_late)
    with running(store, silent, lease_s=lease_s):
        store.put(job("j"))
        wait_for(lambda: store.get("j").fence == 2)
        time.sleep(2 * lease_s)  # it waits for the old one
        assert store.get("j").fence == 2
        notice.set()
        wait_for(lambda: len(fences) == 2)
        time.sleep(2 * lease_s)
        assert store.get("j").fence == 2
        go_on.set()
        assert ended(store, "j").status == "completed"
    store.close()
    assert (fences, at_once) == ([1, 2], [0, 1])


def test_a_job_whose_size_can_not_be_told_fails_with_the_reason(store):
    """It was accepted by another version."""

    def size(job) -> int:
        raise ValueError("a plan of tomorrow")

    with running(store, finish, size=size) as runner:
        store.put(job("j"))
        found = ended(store, "j")
        wait_for(lambda: runner.running == 0)
    assert (found.status, found.result) == ("failed", b"ValueError('a plan of tomorrow')")


def test_an_attempt_without_a_thread_counts_and_is_not_renewed(store, monkeypatch):
    """Its lease runs out, and whoever has threads takes it."""
    real, refuse = threading.Thread.start, [True]

    def start(thread: threading.Thread) -> None:
        if thread.name == "j" and refuse[0]:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with running(store, finish, lease_s=0.2) as runner:
        store.put(job("j"))
        wait_for(lambda: store.get("j").tries == 2)
        assert runner.running == 0
        refuse[0] = False
        assert ended(store, "j").status == "completed"


def test_leases_are_renewed(store):
    with running(store, wait_until_told, lease_s=0.5):
        store.put(job("j"))
        wait_for(lambda: store.get("j").status == "in_progress")
        time.sleep(1.0)
        assert store.get("j").fence == 1


def test_a_drain_puts_work_back_but_lets_those_who_wait_finish(store):
    go_on = threading.Event()

    def work(lease: Lease) -> None:
        while not go_on.is_set():
            lease.check()
            time.sleep(0.01)
        finish(lease)

    with running(store, work) as runner:
        store.put(job("back"))
        store.put(job("now", lane=Lane.NOW))
        wait_for(lambda: runner.running == 2)
        runner.drain(60.0)
        wait_for(lambda: runner.running == 1)
        assert store.claim(Lane.BATCH, 30.0, 5.0).id == "back"  # a claim under way may have it
        go_on.set()
        ended(store, "now")
        store.put(job("later"))
        time.sleep(0.2)
        assert runner.running == 0
        assert store.claim(Lane.BATCH, 30.0, 5.0).id == "later"  # as above


def test_what_has_expired_is_swept(store):
    swept = []
    store.put(job("j", kind="file", status="completed", created=0.0))
    runner = Runner(
        store,
        {},
        ready=lambda: True,
        size=lambda job: 1,
        room=1,
        failed=lambda job, error: b"",
        on_swept=swept.append,
    )
    runner.start()
    wait_for(lambda: ["j"] in swept)
    runner.close()


def test_jobs_that_somebody_waits_for_are_left_to_others_without_room(store):
    go_on = threading.Event()

    def work(lease: Lease) -> None:
        go_on.wait(60)
        finish(lease)

    with running(store, work, room_now=2):
        for i in range(3):
            store.put(job(f"j{i}", lane=Lane.NOW))
        wait_for(lambda: store.get("j1").status == "in_progress")
        time.sleep(0.2)
        assert store.get("j2").status == "queued"
        go_on.set()
        assert ended(store, "j2")
