"""Completions that are kept: in the background, or under an Idempotency-Key.

Both are jobs. Who waits for one follows what the job has in the store, so waiting may break off
and be taken up again, by another process too.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import msgspec

from nanogpt.api import client_socket
from nanogpt.api.admission import Ticket
from nanogpt.api.answer import EVENT_STREAM, Answer
from nanogpt.api.backend import Cluster
from nanogpt.api.caller import Caller
from nanogpt.api.client_socket import Peer
from nanogpt.api.errors import ClientGone
from nanogpt.api.jobs import once, outcome
from nanogpt.api.jobs.follow import follow, news
from nanogpt.api.jobs.objects import Deleted
from nanogpt.api.jobs.owned import owned
from nanogpt.api.plan import GATHER_S, Plan, real_name
from nanogpt.api.protocol import CompletionRequest
from nanogpt.api.response import encode
from nanogpt.api.service import CLIENT_GONE, Service
from nanogpt.errors import InvalidRequest, NotFound, Unavailable, draining
from nanogpt.jobs.store import ONCE_S, Job, Lane, Store
from nanogpt.registry import ModelCard

# Added to a request's own priority, where a lower one goes first.
BACKGROUND_PRIORITY = 1_000_000
BATCH_PRIORITY = 2_000_000
_MAX_PRIORITY = 2**31 - 1


class Completions:
    """Thread-safe. A completion belongs to the API key that asked for it; an admin sees all."""

    def __init__(
        self,
        service: Service,
        store: Store,
        cluster: Cluster,
        cards: Mapping[str, ModelCard],
        *,
        keep_s: float,
        clock: Callable[[], float],
        settles: bool = True,
    ) -> None:
        """`settles`: jobs are done by this process, so it is told what they used. Otherwise they
        count with all that was reserved for them."""
        self._settles = settles
        self._service, self._store, self._cluster = service, store, cluster
        self._cards, self._keep_s, self._clock = cards, keep_s, clock
        self._tickets: dict[str, Ticket] = {}
        self._lock = threading.Lock()

    # POST /v1/completions

    def create(
        self,
        caller: Caller,
        body: bytes,
        content_type: str | None,
        peer: Peer | None,
        started: float,
        key: str | None,
    ) -> Answer:
        """`key`: of the header Idempotency-Key; the others as in Service.complete."""
        request = caller.read_completion(body, content_type)
        if key is None and not request.background:
            return self._service.complete(caller, request, peer, started)
        name = once.name(caller, key)
        digest = once.digest("completions", body) if name else b""
        if request.background and not request.stream:
            job = self._accept(caller, request, name, digest)
            shown = encode(outcome.stored(job, "queued"))
            return Answer(shown, 202, headers={"Location": f"/v1/completions/{job.id}"})
        wait = _Wait(self._service, peer)
        with ExitStack() as undo:
            undo.callback(wait.close)
            job = self._accept(caller, request, name, digest)
            self._prepare(wait, job)
            if not request.stream:
                return self._whole(job, wait)
            answer = self._stream(job, wait, after=-1, numbered=request.background)
            undo.pop_all()
            return answer

    def _accept(self, caller: Caller, request: CompletionRequest, name: str, digest: bytes) -> Job:
        """The job that answers the request: that of an earlier one with the same name, or a new
        one, which is durable when this returns."""
        models = self._cluster.models()
        model = real_name(models, request.model, self._cards)
        caller.precheck(request.user, model, request.priority)
        known = self._store.find(name) if name else None
        if known is not None:
            once.check(known, digest)
            return known
        self._check_draining()
        info = caller.find_model(models, model, self._cards)
        plan = caller.plan(request, info, self._cluster.tokenizer(info.name), self._clock)
        return self._put(caller, plan, name, digest)

    def _put(self, caller: Caller, plan: Plan, name: str, digest: bytes) -> Job:
        background = plan.completion.background
        if background:
            plan = behind(plan, BACKGROUND_PRIORITY, 0.0 if plan.completion.stream else GATHER_S)
        job = Job(
            id=plan.request.request_id,
            kind="completion",
            owner=caller.name,
            created=self._clock(),
            request=outcome.encode(plan),
            keep_s=self._keep_s if background else min(self._keep_s, ONCE_S),
            lane=Lane.BACKGROUND if background else Lane.NOW,
            once=name,
            digest=digest,
        )
        ticket = caller.admit(plan)
        if self._settles:
            with self._lock:
                self._tickets[job.id] = ticket
        try:
            stored = self._store.put(job)
        except BaseException:
            self.settle(job.id, 0, 0)
            raise
        if stored.id != job.id:  # another thread was faster
            self.settle(job.id, 0, 0)
            once.check(stored, digest)
        return stored

    def _check_draining(self) -> None:
        if self._cluster.status().draining:
            raise draining()

    def settle(self, job_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """What the job has used: the rest of what was reserved for it is given back. A job that
        an earlier process accepted has no reservation any more."""
        with self._lock:
            ticket = self._tickets.pop(job_id, None)
        if ticket is not None:
            ticket.settle(prompt_tokens, completion_tokens)

    # Waiting

    def _prepare(self, wait: "_Wait", job: Job) -> None:
        wait.job_id = job.id
        if job.lane != Lane.NOW:  # it doesn't go on before the server is back
            wait.must_end = lambda: self._cluster.status().draining

    def _whole(self, job: Job, wait: "_Wait") -> Answer:
        now: Job | None = job
        try:
            while now is not None and not now.ended:
                wait.look_around()
                found = news(self._store, job.id, 2**62)
                now = now if found is None else found[0]
        except ClientGone:
            return Answer(b"", CLIENT_GONE)
        if now is None:
            raise NotFound("the completion was deleted")
        ended = outcome.outcome_of(now)
        return Answer(ended.body, ended.status)

    def _stream(self, job: Job, wait: "_Wait", *, after: int, numbered: bool) -> Answer:
        tokenizer = self._cluster.tokenizer(outcome.plan_of(job).request.model)
        events = follow(
            job,
            self._store,
            tokenizer,
            after=after,
            numbered=numbered,
            look_around=wait.look_around,
        )
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        headers["Location"] = f"/v1/completions/{job.id}"
        return Answer(events, content_type=EVENT_STREAM, headers=headers, exchange=wait)

    # /v1/completions/{id}

    def show(
        self,
        caller: Caller,
        completion_id: str,
        *,
        stream: str | None,
        starting_after: str | None,
        peer: Peer | None,
    ) -> Answer:
        """As it is now; with stream "true" its events, those after a number or all."""
        job = self._find(caller, completion_id)
        if not _is_true(stream):
            if starting_after is not None:
                raise InvalidRequest(
                    "starting_after is only allowed with stream=true", param="starting_after"
                )
            return Answer(encode(outcome.stored(job)))
        after = _number(starting_after)
        if not self._cluster.models():
            raise Unavailable("the model is being loaded; try again soon", code="starting")
        wait = _Wait(self._service, peer)
        with ExitStack() as undo:
            undo.callback(wait.close)
            self._prepare(wait, job)
            answer = self._stream(job, wait, after=after, numbered=True)
            undo.pop_all()
            return answer

    def cancel(self, caller: Caller, completion_id: str) -> Answer:
        """May be asked for again; one that has ended stays as it is."""
        job = self._store.cancel(self._find(caller, completion_id).id)
        if job is None:
            raise _not_found(completion_id)
        if job.status == "cancelled":
            self.settle(job.id, 0, 0)
        return Answer(encode(outcome.stored(job)))

    def delete(self, caller: Caller, completion_id: str) -> Answer:
        """Also what still runs."""
        job = self._find(caller, completion_id)
        self._store.delete(job.id)
        self.settle(job.id, 0, 0)
        return Answer(encode(Deleted(job.id, "text_completion")))

    def _find(self, caller: Caller, completion_id: str) -> Job:
        job = owned(self._store, caller, "completion", completion_id)
        if job is None:
            raise _not_found(completion_id)
        return job


def behind(plan: Plan, priority: int, gather_s: float) -> Plan:
    """The plan, to run after those of less priority, and its tokens to come in few pieces."""
    lower = min(plan.request.priority + priority, _MAX_PRIORITY)
    request = msgspec.structs.replace(plan.request, priority=lower, gather_s=gather_s)
    return msgspec.structs.replace(plan, request=request)


def _not_found(completion_id: str) -> NotFound:
    return NotFound(
        f"there is no completion {completion_id[:100]!r}: it was not made with background, was "
        "deleted, has expired, or belongs to another API key",
        param="id",
    )


def _is_true(text: str | None) -> bool:
    if text not in (None, "true", "false"):
        raise InvalidRequest("stream must be true or false", param="stream")
    return text == "true"


def _number(text: str | None) -> int:
    if text is None:
        return -1
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(
            "starting_after must be the sequence_number of an event: an integer from 0",
            param="starting_after",
        )
    return int(text)


class _Wait:
    """A client that waits for a job: it has a thread of the server until it is closed."""

    def __init__(self, service: Service, peer: Peer | None) -> None:
        service.places.take()
        self.job_id = ""
        self.must_end = service.must_end
        self._service = service
        self._is_client_gone = client_socket.watch(peer)
        self._lock = threading.Lock()
        self._open = True

    def look_around(self) -> None:
        """Raises ClientGone, or Unavailable when the server must end."""
        if self._is_client_gone():
            raise ClientGone
        if self.must_end():
            raise Unavailable(
                "the server shut down before this completion was done; it goes on when the server "
                "is back: ask for it again, or repeat the request with the same Idempotency-Key",
                code="draining",
            )

    def close(self) -> None:
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._service.places.give_back()

    def summary(self) -> str:
        return f"id={self.job_id} stored"
