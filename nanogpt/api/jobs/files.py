"""The routes of files: uploaded for a batch, or written by one."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Annotated, BinaryIO, Literal

import msgspec
from msgspec import Meta

from nanogpt.api.answer import Answer
from nanogpt.api.caller import Caller
from nanogpt.api.decode import clip
from nanogpt.api.jobs import once
from nanogpt.api.jobs.objects import Deleted, FileList, FileObject
from nanogpt.api.jobs.owned import owned
from nanogpt.api.jobs.paging import page
from nanogpt.api.jobs.upload import Received, receive
from nanogpt.api.response import encode
from nanogpt.errors import InvalidRequest, NotFound
from nanogpt.jobs.files import Files, info_of
from nanogpt.jobs.store import Job, Store

PURPOSE = "batch"
MIN_KEEP_S, MAX_KEEP_S = 3600, 2_592_000
MAX_NAME_CHARS = 255
MAX_LISTED = 10_000
_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
_CHUNK = 256 * 1024


class UploadForm(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of POST /v1/files."""

    file: Annotated[bytes, Meta(description="the content")]
    purpose: Literal["batch"]
    expires_after_anchor: Annotated[
        Literal["created_at"], Meta(description="with expires_after[seconds]")
    ] = msgspec.field(default="created_at", name="expires_after[anchor]")
    expires_after_seconds: (
        Annotated[int, Meta(ge=MIN_KEEP_S, le=MAX_KEEP_S, description="how long to keep it")] | None
    ) = msgspec.field(default=None, name="expires_after[seconds]")


class FileRoutes:
    """Thread-safe. A file belongs to the API key that made it; an admin sees all."""

    def __init__(self, files: Files, store: Store, *, keep_s: float) -> None:
        self._files, self._store, self._keep_s = files, store, keep_s

    def create(
        self, caller: Caller, stream: IO[bytes], content_type: str | None, key: str | None
    ) -> Answer:
        """`stream`: the body, which is never held in memory."""
        name = once.name(caller, key)
        with ExitStack() as stack:
            received = receive(stream, content_type, self._files.upload, stack)
            keep_s = self._check(received)
            filename = clip(received.filename, MAX_NAME_CHARS)
            digest = b""
            if name:  # of the content: each attempt has another boundary
                fields = sorted(f"{k}={v}" for k, v in received.fields.items())
                digest = once.digest(
                    "files", filename.encode(), *map(str.encode, fields), received.upload.digest()
                )
            job = self._files.add(
                received.upload,
                owner=caller.name,
                filename=filename,
                purpose=PURPOSE,
                keep_s=keep_s,
                once=name,
                digest=digest,
            )
            if name:
                once.check(job, digest)
        return Answer(encode(_object(job)))

    def _check(self, received: Received) -> float:
        """How long it is to be kept, in seconds. Raises InvalidRequest."""
        fields = received.fields
        for field in fields:
            if field not in _FIELDS:
                raise InvalidRequest(
                    f"unknown field {clip(field)!r}; known are: file, {', '.join(sorted(_FIELDS))}",
                    param=clip(field),
                )
        if fields.get("purpose") != PURPOSE:
            raise InvalidRequest(f"purpose must be {PURPOSE!r}", param="purpose")
        anchor = fields.get("expires_after[anchor]")
        seconds = fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return self._keep_s
        if anchor != "created_at":
            raise InvalidRequest("expires_after needs anchor 'created_at'", param="expires_after")
        valid = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 9
        if not valid or not MIN_KEEP_S <= int(seconds or 0) <= MAX_KEEP_S:
            raise InvalidRequest(
                f"expires_after needs seconds, an integer from {MIN_KEEP_S} to {MAX_KEEP_S}",
                param="expires_after",
            )
        return float(seconds or 0)

    def list(self, caller: Caller, query: Mapping[str, str]) -> Answer:
        """The newest come first, or with order "asc" the oldest."""
        purpose = query.get("purpose")
        jobs, more = page(
            self._store,
            caller,
            "file",
            query,
            default=MAX_LISTED,
            most=MAX_LISTED,
            wanted=lambda job: purpose in (None, info_of(job).purpose),
        )
        found = [_object(job) for job in jobs]
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return Answer(encode(FileList(found, first, last, more)))

    def get(self, caller: Caller, file_id: str) -> Answer:
        return Answer(encode(_object(self.find(caller, file_id))))

    def content(self, caller: Caller, file_id: str) -> Answer:
        job = self.find(caller, file_id)
        size = {"Content-Length": str(info_of(job).bytes)}
        body = _chunks(self._files.open(job.id))
        return Answer(body, content_type="application/octet-stream", headers=size)

    def delete(self, caller: Caller, file_id: str) -> Answer:
        job = self.find(caller, file_id)
        self._files.delete(job.id)
        return Answer(encode(Deleted(job.id, "file")))

    def find(self, caller: Caller, file_id: str, param: str = "id") -> Job:
        """Raises NotFound, also for a file of another key."""
        job = owned(self._store, caller, "file", file_id)
        if job is None:
            raise NotFound(
                f"there is no file {clip(file_id, 100)!r}: it was deleted, has expired, or belongs "
                "to another API key",
                param=param,
            )
        return job


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while data := file.read(_CHUNK):
            yield data


def _object(job: Job) -> FileObject:
    info = info_of(job)
    return FileObject(
        id=job.id,
        bytes=info.bytes,
        created_at=int(job.created),
        expires_at=int(job.created + job.keep_s),
        filename=info.filename,
        purpose=info.purpose,
    )
