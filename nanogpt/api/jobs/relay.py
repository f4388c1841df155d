"""A request that a web server took and a cluster generates: what they tell each other in a job.

The job holds the engines' request, its records their events, its state the fingerprint of the model
that generated them, its result the last event if that says that it failed. Text, stop strings and
limits are the web server's business, as without a queue.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from nanogpt.api.backend import Cluster
from nanogpt.api.catalogue import system_fingerprint
from nanogpt.api.jobs import outcome
from nanogpt.api.jobs.execute import RETRY_S, STREAM_FLUSH_S, replaced
from nanogpt.api.jobs.follow import news
from nanogpt.api.jobs.generated import Generated
from nanogpt.api.jobs.whereabouts import Elsewhere, find_here, nowhere
from nanogpt.errors import ApiError
from nanogpt.jobs.runner import Lease
from nanogpt.jobs.store import Job, Lane, Store, StoreUnavailable
from nanogpt.request import EngineEvent, GenerateRequest, RequestFailed, TokenEvent

log = logging.getLogger(__name__)

KEEP_S = 60.0  # after its end, should the web server be slow to read it
LOOK_S = 1.0  # how often a cluster asks whether the client has left


_encode = msgspec.msgpack.Encoder().encode
_requests = msgspec.msgpack.Decoder(GenerateRequest)
_failures = msgspec.msgpack.Decoder(RequestFailed)


def choices(job: Job) -> int:
    """How many it generates."""
    request = _requests.decode(job.request)
    return len(request.prompts) * request.n


def failed(error: Exception) -> bytes:
    """The result of a job that ended in an error."""
    message = error.message if isinstance(error, ApiError) else f"the cluster failed: {error}"
    return _encode(RequestFailed("", message))


class RelayExecutor:
    """The cluster's side: see nanogpt.jobs.runner.Executor."""

    def __init__(self, cluster: Cluster, elsewhere: Elsewhere = nowhere) -> None:
        self._cluster, self._elsewhere = cluster, elsewhere

    def __call__(self, lease: Lease) -> None:
        request = _requests.decode(lease.job.request)
        info = find_here(self._cluster, request.model, self._elsewhere)
        mark = system_fingerprint(info).encode()
        # The first who has it needs not ask what others left.
        records = list(lease.each_record()) if lease.job.fence > 1 else []
        so_far = Generated(request, records, mark)
        if records and lease.job.state != mark:
            lease.complete("failed", failed(replaced()))
            return
        failure = None if so_far.done else self._generate(lease, so_far)
        if failure is None:
            lease.complete("completed", b"", records=so_far.unkept())
        else:
            lease.complete("failed", _encode(failure), records=so_far.unkept())

    def _generate(self, lease: Lease, so_far: Generated) -> RequestFailed | None:
        """What the engines gave it up with, if they did."""
        handle = self._cluster.submit(so_far.remaining(lease.job.fence))
        keep_at, look_at = 0.0, time.monotonic() + LOOK_S
        try:
            while not so_far.done:
                now = time.monotonic()
                if now >= look_at:
                    lease.check()
                    look_at = now + LOOK_S
                if so_far.has_unkept and now >= keep_at:
                    keep_at = now + (STREAM_FLUSH_S if so_far.keep(lease) else RETRY_S)
                wait = max(0.0, keep_at - now) if so_far.has_unkept else LOOK_S
                for event in so_far.accept(handle.events(wait)):
                    if isinstance(event, RequestFailed):
                        return event
            return None
        finally:
            if not so_far.done:
                handle.cancel()


class RelayHandle:
    """The web server's side: see nanogpt.api.backend.LiveHandle."""

    def __init__(self, store: Store, request: GenerateRequest) -> None:
        self._store, self._id = store, request.request_id
        self._left = set(range(len(request.prompts) * request.n))  # neither finished nor cancelled
        self._read = 0
        self._over = False

    @property
    def owners(self) -> tuple[int, ...]:
        """Nobody knows yet."""
        return ()

    def events(self, timeout: float) -> Sequence[EngineEvent]:
        if self._over:
            time.sleep(timeout)
            return ()
        now = news(self._store, self._id, self._read, timeout)
        if now is None:
            return ()
        job, records = now
        self._read += len(records)
        found: list[EngineEvent] = []
        for record in records:
            found += outcome.progress(record).events
        self._left -= {e.index for e in found if isinstance(e, TokenEvent) and e.finish_reason}
        if not records and (job is None or job.ended):
            self._over = True
            if self._left:
                found.append(self._failure(job))
        return found

    def _failure(self, job: Job | None) -> RequestFailed:
        if job is None or not job.result:
            return RequestFailed(self._id, "the queue has lost the request")
        return msgspec.structs.replace(_failures.decode(job.result), request_id=self._id)

    def send_to(self, sink: Callable[[Sequence[EngineEvent]], None]) -> None:
        def follow() -> None:
            while self._left and not self._over:
                if events := self.events(LOOK_S):
                    sink(events)

        threading.Thread(target=follow, name=f"follow {self._id}", daemon=True).start()

    def cancel(self, index: int | None = None) -> None:
        """The last choice that is cancelled takes the job with it; until then the cluster goes on
        with all of them."""
        was_open = bool(self._left)
        self._left -= self._left if index is None else {index}
        if self._left or not was_open:
            return
        self._over = True
        try:
            self._store.delete(self._id)
        except StoreUnavailable as error:
            log.warning("request %s goes on for nobody: %s", self._id, error)


def submit(store: Store, request: GenerateRequest, now: float) -> RelayHandle:
    """Have some cluster generate it. Raises Unavailable."""
    job = Job(
        id=request.request_id,
        kind="generate",
        owner="",
        created=now,
        request=_encode(request),
        keep_s=KEEP_S,
        lane=Lane.NOW,
    )
    store.put(job)
    return RelayHandle(store, request)
