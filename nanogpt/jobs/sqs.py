"""Jobs in Redis, whose delivery is by SQS.

Redis has the jobs, leases, fences, records and results: there is decided who has a job, and how it
ended. A message in SQS only says that a job may be claimed; whoever receives it asks Redis. So
messages may come twice, late, in any order, or never:

- a job is put into Redis first, then its message is sent. When that fails the job is withdrawn, and
  when its sender dies in between, whoever claims next sends it.
- a message is hidden while its job's lease is renewed, and deleted when the job has ended. When a
  lease runs out, Redis notices, and a new message is sent.
- what nobody received in ten minutes is sent again, then after twenty, and so on, until the job is
  taken.
- a queue that fails, or does not answer, holds up its own lane only.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from nanogpt.jobs import sqs_scripts as scripts
from nanogpt.jobs.redis import RedisStore, read_job
from nanogpt.jobs.redis_link import pairs
from nanogpt.jobs.sqs_link import AT_ONCE, Body, Message, Queues
from nanogpt.jobs.sqs_receiver import Receiver
from nanogpt.jobs.store import Job, Lane, Status, StoreUnavailable, Verdict

log = logging.getLogger(__name__)

WAIT_S = 2  # of one request for messages
HELD_S = 60  # how long a message is hidden at a time, once its job is being worked on
LOST_S = 600.0  # after which a message that nobody received is sent again
LOOK_S = 0.5  # between two looks for jobs without a message
SENDING_S = 3.0  # how long whoever put a job may take to send its message
UNSENT_JOBS = 1000  # of each lane in one look
FOREIGN_S = 60  # how long messages that are not ours are hidden


class _Held(NamedTuple):
    """The message of a job that is worked on here; hidden until then, by time.monotonic()."""

    fence: int
    lane: Lane
    receipt: str
    until: float


class SqsStore(RedisStore):
    """See Store and RedisStore; `sqs_url` as in the configuration. Raises ConfigError.

    `look_s` is for tests: how often jobs without a message are looked for.
    """

    def __init__(self, sqs_url: str, url: str, *, look_s: float = LOOK_S, **more: Any) -> None:
        super().__init__(url, **more)
        self._queues = Queues(sqs_url)
        self._hidden_s = 10  # what is received but not claimed yet; later the lease of who claims
        self._look_s, self._look_at = look_s, 0.0
        self._unsent: dict[str, float] = {}  # since when a job is seen to have no message
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self._receivers = {lane: self._receiver(lane) for lane in Lane}
        # What nobody waits for, in threads of the lane's own: its queue may take long to answer.
        self._chores = {lane: ThreadPoolExecutor(2, f"sqs-{lane.name.lower()}") for lane in Lane}
        self._sending: dict[Lane, Future[None]] = {}  # messages that were missing
        self._closed = False

    def _receiver(self, lane: Lane) -> Receiver:
        return Receiver(
            lane.name.lower(),
            self._news,
            lambda: self._queues.receive(lane, AT_ONCE, WAIT_S, self._hidden_s),
            lambda messages: self._queues.hide(lane, [m.receipt for m in messages], 0),
        )

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.stop()
        for receiver in self._receivers.values():
            receiver.join()
        self._closed = True
        for chores in self._chores.values():
            chores.shutdown(cancel_futures=True)
        self._queues.close()
        super().close()

    def check(self) -> None:
        """That it can be used as it is configured. Raises StartupError; StoreUnavailable when that
        can't be told now."""
        super().check()
        self._queues.check()

    def put(self, job: Job) -> Job:
        kept = super().put(job)
        if kept.id != job.id or kept.status != "queued":
            return kept
        try:
            self._queues.send(job.lane, [self._message(job.id)])
        except StoreUnavailable:
            if self._withdraw(job.id):
                raise
            return kept  # somebody has it already
        self._mark_sent([job.id])
        return kept

    def _message(self, job_id: str) -> Body:
        return Body(job_id, self.namespace)

    def _withdraw(self, job_id: str) -> bool:
        """False when it is too late for that."""
        return bool(self._surely(scripts.WITHDRAW, job_id))

    def _mark_sent(self, ids: Sequence[str]) -> None:
        try:
            self._run(scripts.SENT, LOST_S, *ids)
        except StoreUnavailable as error:
            log.info("%d jobs may be sent once more: %s", len(ids), error)

    # Claiming

    def claim(self, last: Lane, lease_s: float, timeout_s: float) -> Job | None:
        """See Store. With `timeout_s` 0 what SQS shows at once."""
        self._hidden_s = math.ceil(lease_s)
        lanes = [lane for lane in Lane if lane <= last]
        self._resend()
        if timeout_s <= 0:
            wait(self._sending.values())
            return next((j for lane in lanes if (j := self._claim_now(lane, lease_s))), None)
        end = time.monotonic() + timeout_s
        while (found := self._next(lanes, end)) is not None:
            if (job := self._take(*found, lease_s)) is not None:
                return job
        return None

    def _claim_now(self, lane: Lane, lease_s: float) -> Job | None:
        while messages := self._queues.receive(lane, 1, 0, self._hidden_s):
            if (job := self._take(lane, messages[0], lease_s)) is not None:
                return job
        return None

    def _next(self, lanes: Sequence[Lane], end: float) -> tuple[Lane, Message] | None:
        """The first message, by lane, that has come or comes until `end`. Raises StoreUnavailable
        when all of the lanes fail."""
        failed = set()
        with self._news:
            while True:
                for lane in lanes:
                    try:
                        message = self._receivers[lane].take()
                    except StoreUnavailable as error:
                        failed.add(lane)
                        if len(failed) == len(lanes):
                            raise
                        log.error("jobs of %s wait: %s", lane.name, error)
                        continue
                    if message is not None:
                        return lane, message
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self._news.wait(left)

    def _take(self, lane: Lane, message: Message, lease_s: float) -> Job | None:
        """The job that the message is about, unless somebody has it or it has ended."""
        if message.body is None or message.body.name != self.namespace:
            log.warning("a queue of %s holds messages that are not ours", lane.name)
            self._later(self._queues.hide, lane, [message.receipt], FOREIGN_S)
            return None
        job_id = message.body.job
        answer = self._run(scripts.TAKE, job_id, lease_s)
        if isinstance(answer, bytes):  # it may be another's for as long as that
            seconds = math.ceil(float(answer))
            self._later(self._queues.hide, lane, [message.receipt], seconds)
            return None
        if not answer:
            self._later(self._queues.delete, lane, message.receipt)
            return None
        job = read_job(answer)
        assert job is not None
        with self._lock:
            until = time.monotonic() + self._hidden_s
            self._held[job_id] = _Held(job.fence, lane, message.receipt, until)
        return job

    def _later(self, action: Any, lane: Lane, *arguments: Any) -> None:
        self._chores[lane].submit(self._best_effort, action, lane, *arguments)

    def _best_effort(self, action: Any, *arguments: Any) -> bool:
        """What happens by itself later, when it fails now."""
        try:
            action(*arguments)
        except StoreUnavailable as error:
            log.info("a message stays as it is: %s", error)
            return False
        return True

    def _resend(self) -> None:
        """Messages for jobs that have none: their sender or their holder died."""
        now = time.monotonic()
        with self._lock:
            if now < self._look_at:
                return
            self._look_at = now + self._look_s
        due, every = (_by_id(found) for found in self._run(scripts.UNSENT, UNSENT_JOBS))
        with self._lock:
            self._unsent = {job_id: self._unsent.get(job_id, now) for job_id in every}
            due |= {i: every[i] for i, since in self._unsent.items() if now - since >= SENDING_S}
        for lane in Lane:
            ids = [job_id for job_id, its in due.items() if its is lane]
            before = self._sending.get(lane)
            if ids and (before is None or before.done()):
                self._sending[lane] = self._chores[lane].submit(self._send_all, lane, ids)

    def _send_all(self, lane: Lane, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            try:
                self._queues.send(lane, [self._message(job_id) for job_id in some])
            except StoreUnavailable as error:
                left = ids[start:]
                log.error("%d jobs of %s wait for a message: %s", len(left), lane.name, error)
                with self._lock:  # again after SENDING_S
                    self._unsent.update(dict.fromkeys(left, time.monotonic()))
                return
            except Exception:  # nobody looks at the end of this thread
                log.exception("sending messages failed")
                return
            self._mark_sent(some)
            if self._closed:
                return

    # Holding

    def renew(self, held: Mapping[str, int], lease_s: float) -> dict[str, Verdict]:
        verdicts = super().renew(held, lease_s)
        for job_id, verdict in verdicts.items():
            if verdict == "lost":
                self._let_go(job_id, held[job_id])
            elif not lease_s:
                self._give_back(job_id, held[job_id])
        if lease_s:
            self._hide_on(held)
        return verdicts

    def _give_back(self, job_id: str, fence: int) -> None:
        """Its message is shown again; failing that, it gets a new one soon."""
        held = self._let_go(job_id, fence)
        if held is None:
            with self._lock:
                self._look_at = 0.0
                self._unsent[job_id] = 0.0
        elif self._best_effort(self._queues.hide, held.lane, [held.receipt], 0):
            self._mark_sent([job_id])

    def _hide_on(self, held: Mapping[str, int]) -> None:
        """Those messages that would be seen soon."""
        now = time.monotonic()
        chunks: dict[Lane, list[str]] = {lane: [] for lane in Lane}
        with self._lock:
            for job_id in held:
                mine = self._held.get(job_id)
                if mine is not None and mine.until - now < HELD_S / 2:
                    chunks[mine.lane].append(mine.receipt)
                    self._held[job_id] = mine._replace(until=now + HELD_S)
            # Of jobs that were lost without a word.
            for job_id in [i for i, mine in self._held.items() if mine.until < now]:
                del self._held[job_id]
        for lane, receipts in chunks.items():
            for start in range(0, len(receipts), AT_ONCE):
                some = receipts[start : start + AT_ONCE]
                self._later(self._queues.hide, lane, some, HELD_S)

    def append(
        self, job_id: str, fence: int, records: Sequence[bytes], state: bytes | None = None
    ) -> Verdict:
        verdict = super().append(job_id, fence, records, state)
        if verdict == "lost":
            self._let_go(job_id, fence)
        return verdict

    def complete(self, job_id: str, fence: int, status: Status, result: bytes, **more: Any) -> bool:
        done = super().complete(job_id, fence, status, result, **more)
        held = self._let_go(job_id, fence)
        if done and held is not None:
            self._later(self._queues.delete, held.lane, held.receipt)
        return done

    def _let_go(self, job_id: str, fence: int) -> _Held | None:
        """The message of this lease; that of a later one, which is here too, stays."""
        with self._lock:
            held = self._held.get(job_id)
            return self._held.pop(job_id) if held is not None and held.fence == fence else None


def _by_id(flat: Sequence[bytes]) -> dict[str, Lane]:
    return {job_id: Lane(int(lane)) for job_id, lane in pairs(flat)}
