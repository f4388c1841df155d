"""The front end's view of the cluster: submit a request, follow its events.

One I/O thread owns the sockets, the epoch and every handle's progress. HTTP threads talk to it
through a deque and an eventfd. A worker group that comes (back) says Hello, gets a new epoch, and
receives every unfinished request again together with the tokens that its choices have so far.
Which models are in memory, and so which requests may run, is decided in residency.py; what a group
may have died of, in suspicion.py.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from nanogpt.cluster.changes import Changes
from nanogpt.cluster.handle import RequestHandle
from nanogpt.cluster.hold import Hold
from nanogpt.cluster.intake import Intake
from nanogpt.cluster.messages import (
    PROTOCOL_VERSION,
    Alive,
    Beat,
    Cancel,
    EventBatch,
    FromRank,
    Hello,
    Introduce,
    Message,
    ProtocolError,
    RankReady,
    Submit,
)
from nanogpt.cluster.orders import ModelOrders
from nanogpt.cluster.residency import Admit, ModelStatus, Refuse, Residency
from nanogpt.cluster.suspicion import Suspicion, is_suspect
from nanogpt.cluster.transport import FrontEndSockets
from nanogpt.cluster.watch import Watch
from nanogpt.errors import ModelNotFound, Unavailable, draining
from nanogpt.registry import ModelInfo
from nanogpt.request import EngineEvent, EngineStats, GenerateRequest
from nanogpt.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

# New requests wait for a group that restarts; one that has not brought a token for so long may not
# come back soon, and then they are better off elsewhere.
RESTART_PATIENCE_S = 30.0
COME_BACK_S = 10  # Retry-After, then
STEADY_S = 30.0  # a group that is there for so long is back, also when no token was needed of it

POLL_MS = 500
BUSY_POLL_MS = 20  # while the time decides about models


class ClusterStatus(NamedTuple):
    epoch: int  # 0: no worker group has come yet
    ranks: int
    ready: bool
    draining: bool
    detail: str


class _Group:
    """One incarnation of the worker group."""

    def __init__(self, epoch: int, identity: bytes, hello: Hello) -> None:
        self.epoch, self.identity, self.hello = epoch, identity, hello
        self.joined: set[int] = set()
        self.ends: list[int] = []  # of the processes whose places its ranks took
        self.ready = False
        self.ready_at = 0.0  # time.monotonic()
        self.dead = False
        self.sent: set[str] = set()  # ids of unfinished requests that it has
        self.trial: RequestHandle | None = None  # a suspect that runs alone


class ClusterClient:
    """Thread-safe. `on_ready` is called from the I/O thread, once for each incarnation."""

    def __init__(
        self,
        sockets: Callable[[], FrontEndSockets],
        *,
        watch: Watch,
        max_outstanding: int,
        on_ready: Callable[[ClusterStatus, dict[str, ModelInfo]], None] | None = None,
        on_orphaned: Callable[[], None] | None = None,
        owner_pid: int | None = None,
        hold: Hold | None = None,
        residency: Residency | None = None,
        save_models: Callable[[list[str], list[str]], None] = lambda resident, pinned: None,
    ) -> None:
        """`save_models` keeps what a group, and another front end, is to begin with."""
        self._make_sockets = sockets
        self._watch = watch
        self._hold = hold or Hold()
        self._residency = residency or Residency(wait_s=float("inf"))
        self._changes = Changes(self._residency, self._learn)
        self.orders = ModelOrders(self._residency, self.models, self._call)
        self._save_models = save_models
        self._saved: tuple[list[str], list[str]] | None = None
        self._on_ready = on_ready
        self._on_orphaned = on_orphaned
        self._owner_fd = os.pidfd_open(owner_pid) if owner_pid else None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # between taking a request and holding all of them back
        self._intake = Intake(max_outstanding)
        self._handles: dict[str, RequestHandle] = {}
        self._group: _Group | None = None
        self._suspicion = Suspicion()
        # A group died, and no token has come since, though somebody waits for one.
        self._down_since: float | None = None
        self._last_epoch = 0
        self._models: dict[str, ModelInfo] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._stats: dict[int, tuple[EngineStats, ...]] = {}
        self._draining = False
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="cluster-io", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._call(self._end)
        self._thread.join()

    # What HTTP threads may ask

    def models(self) -> dict[str, ModelInfo]:
        """Models that are served, by name, in memory or not; empty until a group has come."""
        return dict(self._models)

    def model_states(self) -> dict[str, ModelStatus]:
        """The same models, as far as their memory is concerned."""
        return self.orders.model_states()

    def tokenizer(self, model: str) -> Tokenizer:
        """Raises ModelNotFound."""
        try:
            return self._tokenizers[model]
        except KeyError:
            raise ModelNotFound(f"the model {model!r} does not exist", param="model") from None

    def ready(self) -> bool:
        return self._group is not None and self._group.ready and not self._draining

    def status(self) -> ClusterStatus:
        group = self._group
        ranks = group.hello.world_size if group else 0
        if self._draining:
            detail = "draining: no new requests are taken"
        elif group is None:
            detail = "the workers are starting"
        elif group.dead:
            detail = "a rank has died: the workers are restarting"
        elif not group.ready:
            detail = f"{len(group.joined)} of {ranks} ranks have joined"
        else:
            detail = "ready"
        return ClusterStatus(
            group.epoch if group else 0, ranks, self.ready(), self._draining, detail
        )

    def stats(self) -> dict[int, tuple[EngineStats, ...]]:
        """The latest of each rank, one entry for each of its models."""
        return dict(self._stats)

    def drain(self) -> None:
        """Take no new requests; those that were accepted go on."""
        self._draining = True
        self._hold.end()

    def submit(
        self, request: GenerateRequest, *, is_patient: bool = False, may_block: bool = True
    ) -> RequestHandle:
        """Accept a request: from here on it gets every token, or one RequestFailed.

        One that was interrupted says in `resumed` and `finished` what it has already. While its
        model is not in memory it waits; unless it is patient there is a limit to that. While a
        worker group restarts it waits for the next one, and during a reload this call does if it
        may. Raises Unavailable otherwise, before the first group has come, when one does not come
        back, while draining, and when too much is outstanding. A request that still runs under the
        same id fails.
        """
        known = self._models.get(request.model)
        while True:
            self._check_open(RESTART_PATIENCE_S if may_block else 0.0)
            with self._lock:
                # Under the lock: what is accepted from here on must not be overlooked by a reload.
                if self._hold.is_open:
                    handle = self._accept(request, is_patient)
                    break
        now = self._models.get(request.model)
        if known is not None and now is not None and known.fingerprint != now.fingerprint:
            handle.cancel()
            raise Unavailable("the model has just been reloaded; try again", code="starting")
        return handle

    def _check_open(self, wait_s: float) -> None:
        """Raises Unavailable when no requests are taken. Waits so long for the end of a reload."""
        is_open = self._hold.wait(wait_s)
        if self._draining:
            raise draining()
        if self._group is None or not self._models:
            raise Unavailable("the model is being loaded; try again soon", code="starting")
        down_since = self._down_since
        down = down_since is not None and time.monotonic() - down_since > RESTART_PATIENCE_S
        if down or not is_open:
            raise Unavailable(
                "the workers are restarting and are not back yet; try again later",
                code="starting",
                retry_after=COME_BACK_S,
            )

    def _accept(self, request: GenerateRequest, is_patient: bool) -> RequestHandle:
        """Count and place a request; the I/O thread sends it. Call with the lock."""
        place = self._intake.take(len(request.prompts) * request.n, request.finished)
        info = self._models.get(request.model)
        fingerprint = info.fingerprint if info else ""
        handle = RequestHandle(request, place, self._cancel, fingerprint, is_patient=is_patient)
        self._call(lambda: self._admit(handle))
        return handle

    def _cancel(self, handle: RequestHandle, index: int | None) -> None:
        self._call(lambda: self._apply_cancel(handle, index))

    def _call(self, function: Callable[[], None]) -> None:
        """Have the I/O thread run this."""
        self._calls.append(function)
        os.eventfd_write(self._wake, 1)

    # The I/O thread

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException:
            # Without this thread nobody would ever be answered: end, so that the master notices.
            log.critical("the cluster thread failed", exc_info=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def _loop(self) -> None:
        self._sockets = self._make_sockets()
        try:
            self._sockets.watch(self._wake)
            if self._owner_fd is not None:
                self._sockets.watch(self._owner_fd)
            while not self._stop:
                busy = self._is_open and self._residency.is_busy
                self._turn(self._sockets.poll(BUSY_POLL_MS if busy else POLL_MS))
        finally:
            self._sockets.close()

    def _turn(self, readable: set[int]) -> None:
        if self._wake in readable:
            os.eventfd_read(self._wake)
        if self._owner_fd is not None and self._owner_fd in readable:
            self._sockets.unwatch(self._owner_fd)
            self._owner_fd = None
            if self._on_orphaned:
                self._on_orphaned()
        if readable and not readable.isdisjoint(self._watch.pidfds):
            self._bury()
        while self._calls:
            self._calls.popleft()()
        try:
            for identity, message in self._sockets.control_messages():
                self._control(identity, message)
            for event in self._sockets.event_messages():
                self._event(event)
        except ProtocolError as error:
            log.error("dropped a message: %s", error)
        now = time.monotonic()
        self._decide(now)
        self._watch.check(now)
        self._hold.turn(now, self._is_idle, self._is_open)

    @property
    def _is_open(self) -> bool:
        return self._group is not None and self._group.ready

    def _is_idle(self) -> bool:
        with self._lock:
            return self._intake.outstanding == 0

    def _end(self) -> None:
        self._stop = True

    def _control(self, identity: bytes, message: Hello | Alive) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif self._group is None or self._group.identity != identity:
            self._sockets.send(identity, Introduce())

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            log.error("refused workers of protocol %d, not %d", hello.version, PROTOCOL_VERSION)
            return
        if self._group is not None and self._group.identity == identity:
            return  # it was asked twice to introduce itself
        # Larger than any epoch an earlier front end granted: the clock counts in between.
        self._last_epoch = max(self._last_epoch + 1, int(time.time() * 1000))
        self._bury()
        for info in hello.models:
            self._learn(info)
        self._models = {info.name: info for info in hello.models}
        needs = hello.needs or (0,) * len(hello.models)
        self._residency.configure(dict(zip(self._models, needs, strict=True)), hello.budget)
        for handle in [h for h in self._handles.values() if h.request.model not in self._models]:
            self._fail(handle, "the model is no longer there")
        self._changes.greet(hello.world_size)
        self._stats.clear()
        self._group = _Group(self._last_epoch, identity, hello)
        self._watch.begin(hello.pid)
        log.info("epoch %d: %d ranks, pid %d", self._last_epoch, hello.world_size, hello.pid)
        self._sockets.send(identity, self._sockets.welcome(self._last_epoch))

    def _learn(self, info: ModelInfo) -> None:
        """What is known of a model now."""
        known = self._models.get(info.name)
        if known is None or known.tokenizer != info.tokenizer:
            self._tokenizers[info.name] = load_tokenizer(info.tokenizer)
        self._models = {**self._models, info.name: info}

    def _bury(self) -> None:
        """The group is over: a rank has ended, or another group is there. Events that are still on
        their way are good until the next one comes."""
        group = self._group
        if group is None or group.dead:
            return
        for pidfd in self._watch.pidfds:
            self._sockets.unwatch(pidfd)
        group.dead, group.ready = True, False
        self._residency.lose()
        if group.sent:
            self._suspicion.died(self._handles[i] for i in group.sent)
        if self._down_since is None:
            self._down_since = time.monotonic()

    def _event(self, message: FromRank) -> None:
        group = self._group
        if group is None or message.epoch != group.epoch:
            return  # of an incarnation that is over
        if isinstance(message, Beat):
            self._watch.beat(message.rank, message.sent, time.monotonic())
            self._stats[message.rank] = message.stats
            return
        self._watch.receive(message.rank)
        if isinstance(message, EventBatch):
            self._deliver(message)
        elif isinstance(message, RankReady):
            self._join(group, message)
        else:
            self._changes.answer(message, time.monotonic())

    def _join(self, group: _Group, message: RankReady) -> None:
        if group.dead or message.rank in group.joined:
            return
        group.joined.add(message.rank)
        group.ends.append(message.before)
        # Who tells no needs has all models, always.
        self._changes.join(message.rank, message.models if group.hello.needs else (*self._models,))
        pidfd = self._watch.join(message.rank, message.node, message.pid, time.monotonic())
        if pidfd is not None:
            self._sockets.watch(pidfd)
        if len(group.joined) < group.hello.world_size:
            return
        self._intake.begin(group.hello.world_size)
        self._changes.begin(time.monotonic())
        group.ready, group.ready_at = True, time.monotonic()
        self._judge(group)
        if self._handles:
            log.info("epoch %d goes on with %d requests", group.epoch, len(self._handles))
        self._settle(group, group.ready_at)
        self._choose_trial(group)
        if self._on_ready:
            self._on_ready(self.status(), self.models())

    def _settle(self, group: _Group, now: float) -> None:
        """Forget that a group died, when nobody waits for a token of this one, or it stays."""
        if not self._handles or now - group.ready_at > STEADY_S:
            self._down_since = None

    def _judge(self, group: _Group) -> None:
        guilty = self._suspicion.judge(group.ends)
        if isinstance(guilty, RequestHandle):
            log.error("request %s kills the engines: it is given up", guilty.request_id)
            self._fail(guilty, "the engines died of this request, and again when it ran alone")

    def _choose_trial(self, group: _Group) -> None:
        """A suspect runs first, with nothing else but what has been cleared; all when there is
        none."""
        suspects = [
            h for h in self._handles.values() if h.request_id not in group.sent and is_suspect(h)
        ]
        group.trial = max(suspects, key=lambda handle: handle.blame, default=None)

    def _admit(self, handle: RequestHandle) -> None:
        before = self._handles.get(handle.request_id)
        if before is not None:  # an attempt that is ending: the ranks tell requests apart by id
            self._apply_cancel(before, None)
            before.fail("a later attempt of this request has taken its place")
        self._handles[handle.request_id] = handle
        model = handle.request.model
        if model in self._models:
            self._residency.arrive(
                handle.request_id, model, time.monotonic(), is_patient=handle.is_patient
            )
        else:
            self._fail(handle, "the model is no longer there")

    def _decide(self, now: float) -> None:
        """Carry out what follows from all that has happened."""
        group = self._group
        if group is None or not group.ready:
            return
        self._settle(group, now)
        if group.trial and (group.trial.done or not is_suspect(group.trial)):
            self._choose_trial(group)
        only = group.trial.request_id if group.trial else None
        for action in self._residency.turn(now, only):
            if isinstance(action, Admit):
                self._run_on(group, self._handles[action.request_id])
            elif isinstance(action, Refuse):
                self._fail(self._handles[action.request_id], *action[1:])
            else:
                self._tell(group, self._changes.command(action, group.epoch))
        models = (self._residency.resident, self._residency.pinned)
        if models != self._saved:
            self._save_models(*models)
            self._saved = models

    def _run_on(self, group: _Group, handle: RequestHandle) -> None:
        """Send what remains of a request, placed on the present group."""
        if handle.fingerprint not in ("", self._models[handle.request.model].fingerprint):
            self._fail_replaced(handle)
            return
        if not self._intake.is_current(handle.place.placement):
            handle.place = self._intake.place_again(len(handle.owners), handle.finished)
        group.sent.add(handle.request_id)
        self._tell(group, Submit(group.epoch, handle.remaining()))

    def _fail_replaced(self, handle: RequestHandle) -> None:
        if handle.has_begun:
            self._fail(handle, "the weights of the model were replaced while this request ran")
        else:
            message = "the weights of the model have just been replaced; send the request again"
            self._fail(handle, message, "starting", 1)

    def _fail(
        self, handle: RequestHandle, message: str, code: str = "", retry_after: int = 0
    ) -> None:
        self._release(handle, handle.fail(message, code, retry_after))
        self._forget(handle)

    def _tell(self, group: _Group, message: Message) -> None:
        self._sockets.send(group.identity, message)

    def _deliver(self, batch: EventBatch) -> None:
        fresh: dict[str, list[EngineEvent]] = {}
        for kind in (batch.scored, batch.tokens, batch.failed):
            for event in kind:
                handle = self._handles.get(event.request_id)
                if handle is None:
                    continue
                accepted, finished = handle.accept(event)
                if accepted is not None:
                    fresh.setdefault(event.request_id, []).append(accepted)
                self._release(handle, finished)
        for request_id, events in fresh.items():
            handle = self._handles[request_id]
            handle.deliver(events)
            if handle.done:
                self._forget(handle)
        if fresh and self._down_since is not None and self._is_open:
            self._down_since = None

    def _apply_cancel(self, handle: RequestHandle, index: int | None) -> None:
        if self._handles.get(handle.request_id) is not handle:
            return  # it is over
        wanted = set(range(len(handle.owners))) if index is None else {index}
        fresh = wanted - handle.finished
        handle.finished |= fresh
        self._release(handle, fresh)
        if fresh and self._group and self._group.ready:
            self._tell(self._group, Cancel(self._group.epoch, handle.request_id, index))
        if handle.done:
            self._forget(handle)

    def _release(self, handle: RequestHandle, indices: Collection[int]) -> None:
        if indices:
            self._intake.release(handle.place, indices)

    def _forget(self, handle: RequestHandle) -> None:
        del self._handles[handle.request_id]
        self._residency.leave(handle.request_id, time.monotonic())
        if self._group:
            self._group.sent.discard(handle.request_id)
