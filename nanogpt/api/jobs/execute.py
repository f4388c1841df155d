"""Carries out a stored completion: the same way as a request, with what it has so far kept."""

import time
from collections.abc import Callable, Sequence

import msgspec

from nanogpt.api.admission import Admission
from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Cluster, Handle
from nanogpt.api.catalogue import system_fingerprint
from nanogpt.api.errors import ClientGone
from nanogpt.api.jobs import outcome
from nanogpt.api.jobs.generated import Generated
from nanogpt.api.jobs.owned import check_still_allowed
from nanogpt.api.jobs.unattended import unattended
from nanogpt.api.jobs.whereabouts import Elsewhere, find_here, nowhere
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import Plan, make_plan
from nanogpt.api.response import Collected
from nanogpt.api.response import encode as to_json
from nanogpt.errors import Banned, ServerError
from nanogpt.jobs.runner import Lease
from nanogpt.jobs.store import Status
from nanogpt.request import EngineEvent
from nanogpt.tokenizer import Tokenizer

# How often new tokens are kept, and so shown to those who follow. Each time is a disk flush, which
# jobs share.
STREAM_FLUSH_S = 0.05
FLUSH_S = 0.2  # of a job that nobody has asked to stream
RETRY_S = 1.0  # after a store that could not keep them


class CompletionExecutor:
    """See nanogpt.jobs.runner.Executor. `settle` gets a job's id and the tokens that it used: of
    prompts, and generated."""

    def __init__(
        self,
        cluster: Cluster,
        admission: Admission,
        metrics: Metrics,
        settle: Callable[[str, int, int], None],
        elsewhere: Elsewhere = nowhere,
    ) -> None:
        self._cluster, self._admission, self._metrics = cluster, admission, metrics
        self._settle, self._elsewhere = settle, elsewhere

    def __call__(self, lease: Lease) -> None:
        records = list(lease.each_record())
        plan = outcome.plan_of(lease.job)
        info = find_here(self._cluster, plan.request.model, self._elsewhere)
        tokenizer = self._cluster.tokenizer(info.name)
        same = system_fingerprint(info) == plan.fingerprint
        mark = None
        if not same and not records:
            plan = _again(plan, make_plan(plan.completion, info, tokenizer))
            mark = outcome.encode(plan)
        text = Text(plan, tokenizer, records, mark)
        if not same and records:
            lease.complete("incomplete", text.ended(replaced()))
            return
        banned: Banned | None = None
        try:
            done = text.assembler.done or (not lease.cancelled and self._generate(lease, text))
        except Banned as error:
            done, banned = False, error
        usage = text.assembler.usage()
        self._settle(lease.job.id, usage.prompt_tokens, usage.completion_tokens)
        if done:
            lease.complete("completed", text.completed(), records=text.unkept(), state=text.mark)
            return
        status: Status = "failed" if banned else "cancelled"
        lease.complete(status, text.ended(banned), records=text.unkept(), state=text.mark)

    def _generate(self, lease: Lease, text: "Text") -> bool:
        """False when it was cancelled. Raises Banned."""
        job, user = lease.job, text.plan.completion.user
        check_still_allowed(self._admission, job.owner, user, job.id)

        def is_cancelled() -> bool:
            lease.check()
            check_still_allowed(self._admission, job.owner, user, job.id)
            return lease.cancelled

        handle = _Keeper(
            self._cluster.submit(text.remaining(lease.job.fence), is_patient=True), lease, text
        )
        exchange = unattended(text.plan, handle, text.assembler, self._metrics, is_cancelled)
        try:
            for deltas in exchange.deltas():
                text.collected.add(deltas or ())
        except ClientGone:
            return False
        finally:
            exchange.close()
        return True


def replaced() -> ServerError:
    """The rest of a text would be another model's."""
    return ServerError(
        "the model or the engine was replaced while this completion was generated, so its text "
        "can't go on; send the request again"
    )


def _again(old: Plan, new: Plan) -> Plan:
    """The new plan as if it had been accepted when the old one was."""
    request = msgspec.structs.replace(
        new.request,
        request_id=old.request.request_id,
        priority=old.request.priority,
        tenant=old.request.tenant,
        weight=old.request.weight,
        gather_s=old.request.gather_s,
        params=msgspec.structs.replace(new.request.params, seed=old.request.params.seed),
    )
    return msgspec.structs.replace(new, request=request, created=old.created)


class Text(Generated):
    """A completion as far as it has come: what was kept, and on top of it what is not yet."""

    def __init__(
        self, plan: Plan, tokenizer: Tokenizer, records: Sequence[bytes], mark: bytes | None
    ) -> None:
        super().__init__(plan.request, mark=mark)
        self.plan = plan
        self.assembler = Assembler(plan, tokenizer)
        self.collected = Collected(plan)
        for record in records:
            events = outcome.progress(record).events
            self._count(events)
            deltas, _ = self.assembler.feed(events)
            self.collected.add(deltas)

    def finished(self) -> list[int]:
        """Also choices that a stop string has ended."""
        return [c.index for c in self.assembler.choices if c.finish_reason is not None]

    def completed(self) -> bytes:
        """The result of the job."""
        return outcome.encode(outcome.Outcome(200, self._json()))

    def ended(self, error: Exception | None) -> bytes:
        """The result when it was cancelled, or can't go on because of `error`."""
        partial = self._json() if self.has_any else b""
        if error is None:
            return outcome.encode(outcome.cancelled(partial))
        return outcome.encode(outcome.failure(error, partial))

    def _json(self) -> bytes:
        chosen = self.assembler.best(self.plan.completion.n)
        return to_json(self.collected.completion(self.assembler, chosen))


class _Keeper:
    """A handle whose events are kept in the store on their way."""

    def __init__(self, handle: Handle, lease: Lease, text: Text) -> None:
        self._interval = STREAM_FLUSH_S if text.plan.completion.stream else FLUSH_S
        self._handle, self._lease, self._text = handle, lease, text
        self._keep_at = 0.0  # the first ones at once

    @property
    def owners(self) -> tuple[int, ...]:
        return self._handle.owners

    def events(self, timeout: float) -> Sequence[EngineEvent]:
        if self._text.has_unkept:
            left = self._keep_at - time.monotonic()
            if left <= 0:
                self._keep()
            else:
                timeout = min(timeout, left)
        return self._text.accept(self._handle.events(timeout))

    def _keep(self) -> None:
        kept = self._text.keep(self._lease)
        self._keep_at = time.monotonic() + (self._interval if kept else RETRY_S)
        if kept and self._lease.cancelled:
            raise ClientGone

    def cancel(self, index: int | None = None) -> None:
        self._handle.cancel(index)
