"""Every store of jobs does the same: leases, fences, one terminal result, whatever comes when."""

import secrets
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanogpt.errors import StartupError, Unavailable
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.sqlite import SqliteStore
from nanogpt.jobs.sqs import SqsStore
from nanogpt.jobs.store import ONCE_S, Job, Lane, Store, StoreUnavailable
from tests.redis_server import redis_server
from tests.sqs_server import CREDENTIALS, SqsServer, sqs_server

LEASE_S = 30.0
ENDS = ["completed", "failed", "cancelled", "incomplete"]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


Open = Callable[..., Store]


def sqlite_stores(directory: Path, clock: Clock) -> Open:
    """Opens the same store again and again."""

    def open_again(max_queued: int = 1000, max_bytes: int = 10**9) -> Store:
        return SqliteStore(directory, max_queued=max_queued, max_bytes=max_bytes, clock=clock)

    return open_again


def redis_stores(url: str) -> Callable[[Path, Clock], Open]:
    """Of a running Redis."""

    def stores(directory: Path, clock: Clock) -> Open:
        namespace = secrets.token_hex(4)

        def open_again(max_queued: int = 1000, max_bytes: int = 10**9) -> Store:
            return RedisStore(
                url,
                max_queued=max_queued,
                max_bytes=max_bytes,
                namespace=namespace,
                clock=clock,
            )

        return open_again

    return stores


def sqs_stores(server: SqsServer, redis_url: str) -> Callable[[Path, Clock], Open]:
    """Of a running SQS and Redis. Every claim looks for jobs without a message: tests move the
    clock by which leases run out, and not that of SQS."""

    def stores(directory: Path, clock: Clock) -> Open:
        queue, namespace = server.make(), secrets.token_hex(4)

        def open_again(max_queued: int = 1000, max_bytes: int = 10**9) -> Store:
            return SqsStore(
                queue,
                redis_url,
                look_s=0.0,
                max_queued=max_queued,
                max_bytes=max_bytes,
                namespace=namespace,
                clock=clock,
            )

        return open_again

    return stores


@pytest.fixture(scope="module")
def sqs():
    with sqs_server() as server:
        yield server


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["sqlite", "redis", "sqs"])
def stores(request, monkeypatch):
    """Opens stores, each time others."""
    if request.param == "sqlite":
        return sqlite_stores
    redis_url = request.getfixturevalue("redis_url")
    if request.param == "redis":
        return redis_stores(redis_url)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return sqs_stores(request.getfixturevalue("sqs"), redis_url)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_store(stores, tmp_path, clock):
    return stores(tmp_path, clock)


@pytest.fixture
def store(open_store):
    store = open_store()
    yield store
    store.close()


def job(name: str, **fields) -> Job:
    known = {"kind": "completion", "owner": "a", "created": 1_000_000.0, "keep_s": 100.0}
    return Job(**{"id": name, "request": b"what to do", **known, **fields})


def claim(store: Store, last: Lane = Lane.BATCH) -> Job | None:
    return store.claim(last, LEASE_S, 0.0)


def test_what_was_put_is_what_is_got(store):
    given = job("j", owner="key", lane=Lane.NOW, once="n", digest=b"d")
    assert store.put(given) == given
    assert store.get("j") == given
    assert store.get("other") is None


def test_lanes_go_before_age_and_age_before_nothing(store):
    for name, lane in (("c", Lane.BATCH), ("b1", Lane.BACKGROUND), ("b2", Lane.BACKGROUND)):
        store.put(job(name, lane=lane))
    store.put(job("a", lane=Lane.NOW))
    assert [claim(store).id for _ in range(4)] == ["a", "b1", "b2", "c"]
    assert claim(store) is None


def test_lanes_beyond_the_last_are_left_alone(store):
    store.put(job("c", lane=Lane.BATCH))
    assert claim(store, Lane.BACKGROUND) is None
    assert claim(store).id == "c"


def test_a_lease_that_ran_out_is_claimed_with_a_larger_fence(store, clock):
    store.put(job("j"))
    first = claim(store)
    assert (first.status, first.fence, first.started) == ("in_progress", 1, clock.now)
    clock.now += LEASE_S - 1
    assert claim(store) is None
    assert store.renew({"j": first.fence}, LEASE_S) == {"j": "held"}
    clock.now += LEASE_S - 1
    assert claim(store) is None
    clock.now += 1
    second = claim(store)
    assert second.fence > first.fence
    assert store.append("j", first.fence, [b"late"]) == "lost"
    assert not store.complete("j", first.fence, "completed", b"late")
    assert store.renew({"j": first.fence}, LEASE_S) == {"j": "lost"}
    assert store.complete("j", second.fence, "completed", b"good")
    assert store.get("j").result == b"good"
    assert store.read("j", 0)[1] == []


def test_giving_back_is_at_once_and_no_failed_try(store):
    store.put(job("j"))
    first = claim(store)
    store.renew({"j": first.fence}, 0.0)
    second = claim(store)
    assert (second.fence, second.tries) == (2, 1)


def test_tries_count_claims_without_progress(store, clock):
    store.put(job("j"))
    for tries in (1, 2, 3):
        found = claim(store)
        assert found.tries == tries
        clock.now += LEASE_S
    found = claim(store)
    store.append("j", found.fence, [b"x"])
    clock.now += LEASE_S
    assert claim(store).tries == 1


def test_records_are_read_from_any_number_on(store):
    store.put(job("j"))
    fence = claim(store).fence
    store.append("j", fence, [b"0", b"1"], b"state")
    store.append("j", fence, [b"2"])
    found, records = store.read("j", 1)
    assert (found.state, records) == (b"state", [b"1", b"2"])
    assert store.read("j", 0, limit=2)[1] == [b"0", b"1"]
    store.complete("j", fence, "completed", b"r", records=[b"3"], state=b"last")
    found, records = store.read("j", 3)
    assert (found.status, found.state, records) == ("completed", b"last", [b"3"])


def test_records_may_be_forgotten_at_the_end(store):
    store.put(job("j"))
    fence = claim(store).fence
    store.append("j", fence, [b"0"])
    store.complete("j", fence, "completed", b"r", forget_records=True)
    assert store.read("j", 0)[1] == []


def test_cancel_is_at_once_in_the_queue_and_told_to_the_holder(store, clock):
    store.put(job("queued"))
    assert store.cancel("queued").status == "cancelled"
    assert claim(store) is None
    store.put(job("held"))
    fence = claim(store).fence
    assert store.cancel("held").cancelled == clock.now
    clock.now += 1
    again = store.cancel("held")
    assert (again.status, again.cancelled) == ("in_progress", clock.now - 1)
    assert store.append("held", fence, [b"x"]) == "cancelled"
    assert store.renew({"held": fence}, LEASE_S) == {"held": "cancelled"}
    assert store.complete("held", fence, "cancelled", b"")
    assert store.cancel("held").status == "cancelled"
    assert store.cancel("other") is None


def test_delete_takes_the_lease_away(store):
    store.put(job("j", once="n"))
    fence = claim(store).fence
    store.append("j", fence, [b"x"])
    assert store.delete("j")
    assert not store.delete("j")
    assert store.append("j", fence, [b"y"]) == "lost"
    assert store.read("j", 0) == (None, [])
    assert store.find("n") is None


def test_a_name_stands_for_one_job_for_a_day(store, clock):
    store.put(job("first", once="n", created=clock.now))
    assert store.put(job("second", once="n", created=clock.now)).id == "first"
    assert store.get("second") is None
    assert store.find("n").id == "first"
    clock.now += ONCE_S
    assert store.find("n") is None
    assert store.put(job("third", once="n", created=clock.now)).id == "third"
    assert store.get("first").id == "first"


def test_a_refused_job_leaves_the_name_of_another_alone(open_store, clock):
    """What a write did before it was refused is undone."""
    store = open_store(max_queued=1)
    store.put(job("first", once="n", created=clock.now))
    clock.now += ONCE_S
    with pytest.raises(Unavailable):
        store.put(job("second", once="n", created=clock.now))
    assert store.get("first").once == "n"
    store.close()


def test_names_hold_against_many_threads(store):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda i: store.put(job(f"j{i}", once="n")).id, range(40)))
    assert len(found) == 1
    assert len(store.page("completion", None, after="", limit=99, newest=True)) == 1


def test_a_job_goes_to_one_of_many_threads(store):
    for i in range(40):
        store.put(job(f"j{i}"))
    with ThreadPoolExecutor(8) as pool:
        found = [c.id for c in pool.map(lambda _: claim(store), range(50)) if c is not None]
    assert sorted(found) == sorted(f"j{i}" for i in range(40))


def test_readers_and_claimers_are_woken(store):
    """Without sleeping through their timeouts, which would fail the test by its length."""
    claimed, read = [], []
    claimer = threading.Thread(target=lambda: claimed.append(store.claim(Lane.BATCH, LEASE_S, 60)))
    claimer.start()
    store.put(job("j"))
    claimer.join(30)
    reader = threading.Thread(target=lambda: read.append(store.read("j", 0, 60)))
    reader.start()
    store.append("j", claimed[0].fence, [b"x"])
    reader.join(30)
    assert read[0][1] == [b"x"]
    enders = threading.Thread(target=lambda: read.append(store.read("j", 1, 60)))
    enders.start()
    store.complete("j", claimed[0].fence, "completed", b"")
    enders.join(30)
    assert read[1][0].ended


def test_pages(store):
    for i in range(5):
        store.put(job(f"j{i}", owner="ab"[i % 2]))
    store.put(job("f", kind="file", status="completed", finished=1_000_000.0))

    def ids(owner, **more):
        query = {"after": "", "limit": 9, "newest": False, **more}
        return [found.id for found in store.page("completion", owner, **query)]

    assert ids("a") == ["j0", "j2", "j4"]
    assert ids(None, newest=True, limit=2) == ["j4", "j3"]
    assert ids(None, newest=True, after="j3") == ["j2", "j1", "j0"]
    assert ids("a", after="j0", limit=1) == ["j2"]
    assert [found.id for found in store.page("file", "a", after="", limit=9, newest=True)] == ["f"]


def test_what_has_ended_is_forgotten_after_its_time(store, clock):
    store.put(job("open"))
    store.put(job("done"))
    claim(store)
    done = claim(store)
    store.append("done", done.fence, [b"x"])
    store.complete("done", done.fence, "completed", b"")
    store.put(job("f", kind="file", status="completed", created=clock.now, keep_s=500.0))
    clock.now += 99
    assert store.sweep() == []
    clock.now += 1
    assert store.sweep() == ["done"]
    assert store.get("done") is None
    clock.now += 400
    assert store.sweep() == ["f"]
    assert store.get("open") is not None


def test_too_many_are_refused_and_nothing_is_kept(open_store):
    store = open_store(max_queued=2)
    store.put(job("a"))
    store.put(job("b"))
    with pytest.raises(Unavailable, match="2 jobs are queued"):
        store.put(job("c"))
    assert store.get("c") is None
    fence = claim(store).fence
    store.complete("a", fence, "completed", b"")
    store.put(job("c"))
    store.close()


def test_a_store_that_is_full_takes_no_more(open_store):
    store = open_store(max_bytes=2_000_000)
    for i in range(4):
        store.put(job(f"j{i}", request=bytes(500_000)))
    with pytest.raises(Unavailable, match="delete some"):
        store.put(job("one more"))
    store.delete("j0")
    store.delete("j1")
    store.put(job("more"))
    store.close()


def test_records_that_are_forgotten_make_room(open_store):
    """Batches used all of it up, one after the other, for ever."""
    store = open_store(max_bytes=2_000_000)
    for i in range(3):
        store.put(job(f"j{i}"))
        fence = claim(store).fence
        store.append(f"j{i}", fence, [bytes(500_000)] * 2)
        store.complete(
            f"j{i}", fence, "completed", b"", records=[bytes(500_000)], forget_records=True
        )
    store.put(job("none"))
    assert store.complete("none", claim(store).fence, "completed", b"", forget_records=True)
    store.put(job("more"))
    store.close()


def test_repeats_make_room_for_what_was_promised(open_store, clock):
    store = open_store(max_bytes=2_000_000)
    for name, lane in (("promised", Lane.BACKGROUND), ("repeat1", Lane.NOW), ("repeat2", Lane.NOW)):
        store.put(job(name, lane=lane, request=bytes(650_000)))
        store.complete(name, claim(store).fence, "completed", b"")
    assert sorted(store.sweep()) == ["repeat1", "repeat2"]
    assert store.sweep() == []
    assert store.get("promised") is not None
    store.close()


def test_counts(store):
    store.put(job("a", lane=Lane.NOW))
    store.put(job("b"))
    store.put(job("c"))
    claim(store)
    found = {(c.lane, c.status): c.jobs for c in store.counts()}
    assert found == {(Lane.NOW, "in_progress"): 1, (Lane.BACKGROUND, "queued"): 2}


# Any interleaving


class Held(NamedTuple):
    job: str
    fence: int


class Known(msgspec.Struct):
    """What a job must look like."""

    status: str = "queued"
    fence: int = 0
    lease_until: float = 0.0
    cancelled: bool = False
    records: list[bytes] = []
    result: bytes = b""


class Interleavings(RuleBasedStateMachine):
    """Workers that claim, die, wake up late and finish, in any order, against a model."""

    make: Callable[[Path, Clock], Open]
    shared: bool  # between processes: the end of one says nothing of the leases of others
    ordered: bool  # by age; SQS is not

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.open = type(self).make(Path(self.folder.name), self.clock)
        self.store = self.open()
        self.known: dict[str, Known] = {}
        self.leases: list[Held] = []
        self.written = 0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def holds(self, held: Held) -> bool:
        known = self.known[held.job]
        return known.fence == held.fence and known.status == "in_progress"

    @rule()
    def put(self) -> None:
        name = f"j{len(self.known)}"
        self.store.put(job(name))
        self.known[name] = Known()

    @rule()
    def claim(self) -> None:
        now = self.clock.now
        can = [
            name
            for name, known in self.known.items()
            if known.status == "queued"
            or (known.status == "in_progress" and known.lease_until <= now)
        ]
        found = claim(self.store)
        if found is None:
            assert not can
            return
        assert found.id in (can[:1] if self.ordered else can)
        known = self.known[found.id]
        assert found.fence > known.fence
        known.status, known.fence, known.lease_until = "in_progress", found.fence, now + LEASE_S
        self.leases.append(Held(found.id, found.fence))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), seconds=st.sampled_from([LEASE_S, 0.0]))
    def renew(self, data, seconds) -> None:
        held = data.draw(st.sampled_from(self.leases))
        verdict = self.store.renew({held.job: held.fence}, seconds)[held.job]
        assert (verdict != "lost") == self.holds(held)
        if self.holds(held):
            assert (verdict == "cancelled") == self.known[held.job].cancelled
            self.known[held.job].lease_until = self.clock.now + seconds if seconds else 0.0

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), count=st.integers(0, 3))
    def append(self, data, count) -> None:
        held = data.draw(st.sampled_from(self.leases))
        records = [f"{self.written + i}".encode() for i in range(count)]
        self.written += count
        verdict = self.store.append(held.job, held.fence, records)
        assert (verdict != "lost") == self.holds(held)
        if self.holds(held):
            self.known[held.job].records = self.known[held.job].records + records

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), status=st.sampled_from(ENDS))
    def complete(self, data, status) -> None:
        held = data.draw(st.sampled_from(self.leases))
        result = f"{held.job} by {held.fence}: {status}".encode()
        done = self.store.complete(held.job, held.fence, status, result)
        assert done == self.holds(held)
        if done:
            known = self.known[held.job]
            known.status, known.result = status, result

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.store.cancel(name)
        known = self.known[name]
        if known.status == "queued":
            known.status = "cancelled"
        if known.status == "in_progress":
            known.cancelled = True

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def wait(self, seconds) -> None:
        self.clock.now += seconds

    @rule()
    def kill(self) -> None:
        """The process ends with all its leases, and another opens the store."""
        self.store.close()
        self.store = self.open()
        for known in self.known.values():
            known.lease_until = known.lease_until if self.shared else 0.0

    @invariant()
    def is_as_known(self) -> None:
        for name, known in self.known.items():
            found, records = self.store.read(name, 0)
            assert (found.status, found.fence, found.result) == (
                known.status,
                known.fence,
                known.result,
            )
            assert records == known.records


def test_any_interleaving(stores, request):
    kind = request.node.callspec.params["stores"]
    parts = {
        "make": staticmethod(stores),
        "shared": kind != "sqlite",
        "ordered": kind != "sqs",
    }
    machine = type("Machine", (Interleavings,), parts).TestCase
    machine.settings = settings(
        max_examples=5 if kind == "sqs" else 60,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine().runTest()


# SQLite


def test_sqlite_belongs_to_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.jobs.database.LOCK_WAIT_S", 0.1)
    store = sqlite_stores(tmp_path, Clock())()
    with pytest.raises(StartupError, match="another server keeps its jobs in"):
        sqlite_stores(tmp_path, Clock())()
    store.close()
    sqlite_stores(tmp_path, Clock())().close()


def test_sqlite_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "jobs.sqlite").write_text("these are no tables" * 100)
    with pytest.raises(StartupError, match="can't keep jobs in"):
        sqlite_stores(tmp_path, Clock())()
    (tmp_path / "jobs.sqlite").unlink()
    db = sqlite3.connect(tmp_path / "jobs.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StartupError, match="not a job file of this version"):
        sqlite_stores(tmp_path, Clock())()
    with pytest.raises(StartupError, match="can't keep jobs in"):
        sqlite_stores(Path("/proc/nowhere"), Clock())()


def test_sqlite_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path):
    store = sqlite_stores(tmp_path, Clock())()
    store.put(job("before"))
    fence = claim(store).fence
    ((pages,),) = store._db.execute("PRAGMA page_count")
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite makes of ENOSPC, too
    with pytest.raises(StoreUnavailable, match="the disk is full"):
        store.put(job("big", request=bytes(10**6)))
    assert store.get("big") is None
    with pytest.raises(StoreUnavailable):
        store.append("before", fence, [bytes(10**6)])
    assert store.read("before", 0)[1] == []
    assert claim(store) is None
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.put(job("big", request=bytes(10**6)))
    assert store.append("before", fence, [b"x"]) == "held"
    store.close()


def test_sqlite_keeps_what_others_wrote_with_a_failing_write(tmp_path):
    """Writes share a transaction: one that fails must not take the others with it."""
    store = sqlite_stores(tmp_path, Clock())()
    store.put(job("taken"))
    start = threading.Barrier(8)

    def put(i: int) -> bool:
        start.wait()
        try:
            store.put(job("taken" if i % 2 else f"j{i}"))
        except StoreUnavailable:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(put, range(8)))
    assert done == [True, False] * 4
    assert all(store.get(f"j{i}") for i in range(0, 8, 2))
    store.close()
