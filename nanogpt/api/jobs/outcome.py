"""What a completion's job holds: the plan it was accepted with, its records, its result; and as its
state the plan that the records follow, if it had to be planned anew before the first of them."""

from collections.abc import Iterable, Sequence

import msgspec

from nanogpt.api import errors
from nanogpt.api.jobs.objects import StoredCompletion
from nanogpt.api.objects import Completion, ErrorResponse
from nanogpt.api.plan import Plan
from nanogpt.errors import ApiError
from nanogpt.jobs.store import Job, Status
from nanogpt.request import EngineEvent, PromptScored, TokenEvent


class Progress(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """One record: events that came together, without the request's id."""

    scored: tuple[PromptScored, ...]
    tokens: tuple[TokenEvent, ...]

    @classmethod
    def of(cls, events: Iterable[EngineEvent]) -> "Progress":
        plain = [msgspec.structs.replace(event, request_id="") for event in events]
        return cls(
            tuple(e for e in plain if isinstance(e, PromptScored)),
            tuple(e for e in plain if isinstance(e, TokenEvent)),
        )

    @property
    def events(self) -> Sequence[EngineEvent]:
        return (*self.scored, *self.tokens)


class Outcome(msgspec.Struct, frozen=True):
    """How a completion ended: the status and JSON body of its answer, and then, unless it
    completed, what there was of the choices."""

    status: int
    body: bytes
    partial: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_plans = msgspec.msgpack.Decoder(Plan)
_progress = msgspec.msgpack.Decoder(Progress)
_outcomes = msgspec.msgpack.Decoder(Outcome)


def encode(value: Plan | Progress | Outcome) -> bytes:
    return _encode(value)


def plan_of(job: Job) -> Plan:
    """Of a completion's job: what is generated for it, or was."""
    return _plans.decode(job.state or job.request)


def progress(record: bytes) -> Progress:
    return _progress.decode(record)


def outcome_of(job: Job) -> Outcome:
    """Of a completion's job that has ended."""
    if not job.result:  # cancelled while it was queued
        return cancelled()
    return _outcomes.decode(job.result)


def failure(error: Exception, partial: bytes = b"") -> Outcome:
    known = error if isinstance(error, ApiError) else errors.unexpected(error)
    return Outcome(known.status, errors.body(known), partial)


def cancelled(partial: bytes = b"") -> Outcome:
    """As for a request whose client went away, but told to whoever still follows it."""
    error = ApiError("the completion was cancelled", code="cancelled")
    error.status, error.type = 409, "conflict_error"
    return Outcome(error.status, errors.body(error), partial)


def stored(job: Job, status: Status | None = None) -> StoredCompletion:
    """The job as its owner reads it; with `status` "queued" as it was at first."""
    plan = plan_of(job) if status is None else _plans.decode(job.request)
    shown = StoredCompletion(
        id=job.id,
        object="text_completion",
        created=plan.created,
        model=plan.request.model,
        system_fingerprint=plan.fingerprint,
        status=status or job.status,
        background=plan.completion.background,
        metadata=plan.completion.metadata or {},
        choices=[],
        usage=None,
        error=None,
    )
    if status is None and job.ended:
        _show(shown, outcome_of(job))
    return shown


def _show(shown: StoredCompletion, outcome: Outcome) -> None:
    text = outcome.body if shown.status == "completed" else outcome.partial
    if text:
        completion = msgspec.json.decode(text, type=Completion)
        shown.choices, usage = completion.choices, completion.usage
        shown.usage = usage or None
        shown.system_fingerprint = completion.system_fingerprint
    if shown.status in ("failed", "incomplete"):
        shown.error = msgspec.json.decode(outcome.body, type=ErrorResponse).error
