"""The routes of batches, and a batch as its owner reads it."""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nanogpt.api.answer import Answer
from nanogpt.api.backend import Cluster
from nanogpt.api.caller import Caller
from nanogpt.api.decode import check_content_type, clip, decode
from nanogpt.api.jobs import once
from nanogpt.api.jobs.files import PURPOSE, FileRoutes
from nanogpt.api.jobs.objects import (
    Batch,
    BatchErrors,
    BatchList,
    BatchStatus,
    RequestCounts,
)
from nanogpt.api.jobs.owned import owned
from nanogpt.api.jobs.paging import page
from nanogpt.api.protocol import METADATA, Metadata
from nanogpt.api.response import encode
from nanogpt.errors import InvalidRequest, NotFound, draining
from nanogpt.jobs import batches
from nanogpt.jobs.batches import WINDOW_S, BatchSpec, BatchState
from nanogpt.jobs.files import info_of
from nanogpt.jobs.store import Job, Lane, Store


class CreateBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/batches."""

    input_file_id: Annotated[str, Meta(max_length=100, description="the id of a file")]
    endpoint: Annotated[Literal["/v1/completions"], Meta(description='"/v1/completions"')]
    completion_window: Annotated[Literal["24h"], Meta(description='"24h"')]
    metadata: Annotated[Metadata, Meta(description=METADATA)] | None = None


class BatchRoutes:
    """Thread-safe. A batch belongs to the API key that made it; an admin sees all."""

    def __init__(
        self,
        files: FileRoutes,
        store: Store,
        cluster: Cluster,
        *,
        keep_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._files, self._store, self._cluster = files, store, cluster
        self._keep_s, self._clock = keep_s, clock

    def create(
        self, caller: Caller, body: bytes, content_type: str | None, key: str | None
    ) -> Answer:
        check_content_type(content_type)
        request = decode(body, CreateBatch)
        name = once.name(caller, key)
        digest = once.digest("batches", body) if name else b""
        known = self._store.find(name) if name else None
        if known is None:
            if self._cluster.status().draining:
                raise draining()
            file = self._files.find(caller, request.input_file_id, "input_file_id")
            if info_of(file).purpose != PURPOSE:
                raise InvalidRequest(
                    f"input_file_id must be a file with purpose {PURPOSE!r}", param="input_file_id"
                )
            known = self._store.put(self._job(caller, request, name, digest))
        if name:
            once.check(known, digest)
        # As it was accepted, so that a repeat gets the same bytes.
        fresh = msgspec.structs.replace(known, status="queued", state=b"", cancelled=None)
        return Answer(encode(shown(fresh)))

    def _job(self, caller: Caller, request: CreateBatch, name: str, digest: bytes) -> Job:
        now = self._clock()
        spec = BatchSpec(
            input_file_id=request.input_file_id,
            endpoint=request.endpoint,
            completion_window=request.completion_window,
            metadata=request.metadata,
            expires=now + WINDOW_S,
        )
        return Job(
            id=f"batch_{secrets.token_hex(16)}",
            kind="batch",
            owner=caller.name,
            created=now,
            request=batches.encode(spec),
            keep_s=self._keep_s,
            lane=Lane.BATCH,
            once=name,
            digest=digest,
        )

    def list(self, caller: Caller, query: Mapping[str, str]) -> Answer:
        """The newest come first."""
        jobs, more = page(self._store, caller, "batch", query, default=20, most=100)
        found = [shown(job) for job in jobs]
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return Answer(encode(BatchList(found, first, last, more)))

    def get(self, caller: Caller, batch_id: str) -> Answer:
        return Answer(encode(shown(self._find(caller, batch_id))))

    def cancel(self, caller: Caller, batch_id: str) -> Answer:
        """May be asked for again; one that has ended stays as it is."""
        job = self._store.cancel(self._find(caller, batch_id).id)
        if job is None:
            raise _not_found(batch_id)
        return Answer(encode(shown(job)))

    def _find(self, caller: Caller, batch_id: str) -> Job:
        job = owned(self._store, caller, "batch", batch_id)
        if job is None:
            raise _not_found(batch_id)
        return job


def _not_found(batch_id: str) -> NotFound:
    return NotFound(
        f"there is no batch {clip(batch_id, 100)!r}: it has expired, or belongs to another API key",
        param="id",
    )


def shown(job: Job) -> Batch:
    """The batch as its owner reads it."""
    spec, state = batches.spec_of(job.request), batches.state_of(job.state)
    status = _status(job, state)
    batch = Batch(
        id=job.id,
        endpoint=spec.endpoint,
        errors=BatchErrors(state.errors) if state.errors else None,
        input_file_id=spec.input_file_id,
        completion_window=spec.completion_window,
        status=status,
        output_file_id=state.output_file_id,
        error_file_id=state.error_file_id,
        created_at=int(job.created),
        in_progress_at=_seconds(state.in_progress),
        expires_at=int(spec.expires),
        finalizing_at=_seconds(state.finalizing),
        cancelling_at=_seconds(job.cancelled),
        request_counts=RequestCounts(state.total, state.completed, state.failed),
        metadata=spec.metadata,
    )
    if status in ("completed", "failed", "expired", "cancelled"):
        setattr(batch, f"{status}_at", _seconds(job.finished))
    return batch


def _status(job: Job, state: BatchState) -> BatchStatus:
    if job.status == "completed" and state.expired:
        return "expired"
    if job.ended:
        assert job.status in ("completed", "failed", "cancelled")
        return job.status
    return state.phase if job.cancelled is None else "cancelling"


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def custom_request_id(batch_id: str, line: int) -> str:
    """The id of a line of the output."""
    return f"batch_req_{hashlib.sha256(f'{batch_id}/{line}'.encode()).hexdigest()[:24]}"
