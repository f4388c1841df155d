"""Works on the jobs of a store: claims what there is room for, renews leases, lets go at the end.

dispatcher thread   renews the leases of all, claims, starts a thread for each job
a thread for a job  the executor of its kind, with a Lease

When this process stood still for longer than a lease, or the clock jumped, it may claim a job that
it is working on. Then the new thread waits until the old one has noticed its loss, and goes on from
what is kept: a job never runs twice at once here.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nanogpt.errors import Unavailable
from nanogpt.jobs.store import Job, Kind, Lane, Status, Store, StoreUnavailable

log = logging.getLogger(__name__)

LEASE_S = 30.0  # it is renewed three times in this time
SHARED_LEASE_S = 9.0  # where others wait to take over: how long clients wait for that
SWEEP_S = 60.0
CLAIM_S = 0.2  # how long to wait for a job before looking around; a new one is claimed at once
FULL_S = 0.01  # between two looks for room
RETRY_S = 1.0  # after a store or a cluster that could not
MAX_TRIES = 10  # claims in a row that brought no progress: the job ends whoever takes it
MAX_BATCHES = 4  # at once; they share the room


class LeaseLost(Exception):
    """Somebody else has the job, or it is gone: whatever was done now counts for nothing."""


class PutBack(Exception):
    """The job can't go on here now, through no fault of its own."""


class Lease:
    """One job in the hands of one thread."""

    def __init__(self, store: Store, job: Job, must_end: Callable[[], bool]) -> None:
        self.job = job
        self._store, self._must_end = store, must_end
        self.cancelled = job.cancelled is not None
        self.lost = False

    def check(self) -> None:
        """Ask the store for news. Raises LeaseLost; PutBack when this process must end."""
        if self._must_end():
            raise PutBack("the server is shutting down")
        try:
            job = self._store.get(self.job.id)
        except StoreUnavailable:
            return  # it will be asked again
        self._note(job is not None and job.fence == self.job.fence and not job.ended)
        self.cancelled |= job is not None and job.cancelled is not None

    def each_record(self) -> Iterator[bytes]:
        """What was appended so far, under any lease; a part at a time is in memory."""
        count = 0
        while True:
            _, more = self._store.read(self.job.id, count)
            if not more:
                return
            count += len(more)
            yield from more

    def append(self, records: Sequence[bytes], state: bytes | None = None) -> None:
        """Raises LeaseLost; StoreUnavailable, and then nothing was kept."""
        verdict = self._store.append(self.job.id, self.job.fence, records, state)
        self._note(verdict != "lost")
        self.cancelled |= verdict == "cancelled"

    def complete(
        self,
        status: Status,
        result: bytes,
        *,
        records: Sequence[bytes] = (),
        state: bytes | None = None,
        forget_records: bool = False,
    ) -> None:
        """End the job, however long the store takes to be there. Raises LeaseLost, PutBack."""
        while True:
            try:
                held = self._store.complete(
                    self.job.id,
                    self.job.fence,
                    status,
                    result,
                    records=records,
                    state=state,
                    forget_records=forget_records,
                )
            except StoreUnavailable as error:
                log.error("job %s has ended but can't be stored: %s", self.job.id, error)
                if self._must_end():
                    raise PutBack("the store is not there") from error
                time.sleep(RETRY_S)
                continue
            self._note(held)
            return

    def _note(self, held: bool) -> None:
        self.lost |= not held
        if self.lost:
            raise LeaseLost(self.job.id)


Executor = Callable[[Lease], None]
"""Works on a job until it has completed it. May raise LeaseLost or PutBack; anything else fails
the job."""


class _Running(NamedTuple):
    lease: Lease
    size: int  # in choices
    thread: threading.Thread


class Runner:
    """`room` says how many choices more may be worked on; `size` how many a job has; `failed` makes
    the result of a job that ended in an error. `room_now` limits those for which somebody waits,
    where other processes may take them."""

    def __init__(
        self,
        store: Store,
        executors: Mapping[Kind, Executor],
        *,
        ready: Callable[[], bool],
        size: Callable[[Job], int],
        room: int,
        failed: Callable[[Job, Exception], bytes],
        on_swept: Callable[[list[str]], None] = lambda ids: None,
        lease_s: float = LEASE_S,
        room_now: float = float("inf"),
    ) -> None:
        self._store, self._executors, self._ready = store, executors, ready
        self._size, self._room, self._failed, self._on_swept = size, room, failed, on_swept
        self._lease_s, self._room_now = lease_s, room_now
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}  # their leases are renewed
        self._threads: set[threading.Thread] = set()
        self._end_at = {lane: float("inf") for lane in Lane}
        self._claiming = True
        self._stop = threading.Event()
        self._renew_at = self._sweep_at = 0.0
        self._dispatcher = threading.Thread(target=self._dispatch, name="jobs", daemon=True)

    def start(self) -> None:
        self._dispatcher.start()

    def drain(self, grace_s: float) -> None:
        """Claim no more. What runs in the background is put back now, with what it has; jobs for
        which somebody waits have `grace_s` seconds. For a signal handler."""
        self._claiming = False
        now = time.monotonic()
        for lane in Lane:
            self._end_at[lane] = now + (grace_s if lane is Lane.NOW else 0.0)

    def close(self) -> None:
        """Put everything back, and wait until that is done."""
        self.drain(0.0)
        self._stop.set()
        if self._dispatcher.is_alive():
            self._dispatcher.join()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    @property
    def running(self) -> int:
        """Jobs in progress here; those of a drain until they have ended or are put back."""
        return len(self._running)

    # The dispatcher

    def _dispatch(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except StoreUnavailable as error:
                log.error("jobs wait: %s", error)
                self._stop.wait(RETRY_S)
            except Exception:
                log.exception("the dispatcher of jobs stumbled")
                self._stop.wait(RETRY_S)

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:  # before all else: what has run out is claimed by anybody
            with self._lock:
                held = {job_id: its.lease.job.fence for job_id, its in self._running.items()}
            self._store.renew(held, self._lease_s)
            self._renew_at = now + self._lease_s / 3
        if now >= self._sweep_at:
            gone = self._store.sweep()
            self._on_swept(gone)
            self._sweep_at = now if gone else now + SWEEP_S
        if not self._claiming or not self._ready():
            self._stop.wait(0.1)
            return
        last = self._last_lane()
        if last is None:
            self._stop.wait(FULL_S)
            return
        # Without room for all lanes the wait is short: room may be made at any moment.
        job = self._store.claim(last, self._lease_s, CLAIM_S if last is Lane.BATCH else CLAIM_S / 4)
        if job is None:
            return
        if self._claiming:
            self._begin(job)
        else:  # the drain began while this waited
            self._store.renew({job.id: job.fence}, 0.0)

    def _last_lane(self) -> Lane | None:
        """The last lane that there is room for. Those for which somebody waits are never held up
        by the others."""
        with self._lock:
            sizes = [(its.lease.job.lane, its.size) for its in self._running.values()]
        total = sum(size for _, size in sizes)
        used = sum(size for lane, size in sizes if lane != Lane.NOW)
        if total - used >= self._room_now:
            return None
        if used >= self._room:
            return Lane.NOW
        batches = sum(lane == Lane.BATCH for lane, _ in sizes)
        return Lane.BACKGROUND if batches >= MAX_BATCHES else Lane.BATCH

    def _begin(self, job: Job) -> None:
        lease = Lease(self._store, job, lambda: time.monotonic() > self._end_at[job.lane])
        size, problem = self._measure(job)
        with self._lock:
            before = self._running.get(job.id)
            thread = threading.Thread(
                target=self._work,
                args=(lease, before and before.thread, problem),
                name=job.id,
                daemon=True,
            )
            self._running[job.id] = _Running(lease, size, thread)
            self._threads.add(thread)
        try:
            thread.start()
        except BaseException:  # nobody renews it any more, so that this counts as an attempt
            self._forget(lease, thread)
            raise

    def _measure(self, job: Job) -> tuple[int, Exception | None]:
        """How many choices it has, or why that can't be told: another version accepted it."""
        try:
            return self._size(job), None
        except Exception as error:
            return 0, error

    def _forget(self, lease: Lease, thread: threading.Thread) -> None:
        with self._lock:
            its = self._running.get(lease.job.id)
            if its is not None and its.lease is lease:  # it may have been claimed again
                del self._running[lease.job.id]
            self._threads.discard(thread)

    # A job's thread

    def _work(
        self, lease: Lease, before: threading.Thread | None, problem: Exception | None
    ) -> None:
        job = lease.job
        try:
            if before is not None:
                before.join()
                lease.check()  # that may have taken long
            if problem is not None:
                raise problem
            if job.tries > MAX_TRIES:
                raise RuntimeError(f"{job.tries - 1} attempts ended without any progress")
            self._executors[job.kind](lease)
        except LeaseLost:
            log.info("job %s is no longer ours", job.id)
        except (PutBack, Unavailable) as error:
            self._put_back(lease, error)
        except Exception as error:
            self._fail(lease, error)
        finally:
            self._forget(lease, threading.current_thread())

    def _put_back(self, lease: Lease, error: Exception) -> None:
        log.info("job %s goes back to the queue: %s", lease.job.id, error)
        if self._claiming:
            self._stop.wait(RETRY_S)  # it would be claimed again at once
        with contextlib.suppress(StoreUnavailable):  # its lease runs out by itself
            self._store.renew({lease.job.id: lease.job.fence}, 0.0)

    def _fail(self, lease: Lease, error: Exception) -> None:
        try:
            lease.complete("failed", self._failed(lease.job, error))
        except (LeaseLost, PutBack) as why:
            log.error(
                "job %s failed (%s), and that could not be stored: %s", lease.job.id, error, why
            )
