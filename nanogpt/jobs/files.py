"""Files of clients: their content in a directory, what is known of them in the store of jobs.

A file is there when the store says so, which is after its content has reached the disk. Content
that no job knows, from a server that was killed in between, is removed at the next start.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from nanogpt.errors import NotFound, PayloadTooLarge, Unavailable
from nanogpt.jobs.runner import Lease
from nanogpt.jobs.store import Job, Lane, Store, StoreUnavailable

PARTIAL = ".partial"  # what content is named while it is written


class FileInfo(msgspec.Struct, frozen=True):
    """What the store keeps of a file, as JSON."""

    filename: str
    purpose: str
    bytes: int


class Upload:
    """Content that is being written. Close it: without `Files.add` nothing is left."""

    def __init__(self, directory: Path, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.bytes = 0
        try:
            fd, name = tempfile.mkstemp(dir=directory, suffix=PARTIAL)
        except OSError as error:
            raise unavailable(error) from error
        self.path = Path(name)
        self._file = os.fdopen(fd, "wb")

    def write(self, data: bytes | bytearray) -> int:
        """Raises PayloadTooLarge; StoreUnavailable when the disk can't take it."""
        self.bytes += len(data)
        if self._max_bytes is not None and self.bytes > self._max_bytes:
            raise PayloadTooLarge(
                f"the file is over {self._max_bytes // 10**6} MB; split it", param="file"
            )
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            raise unavailable(error) from error

    def digest(self) -> bytes:
        """Of what was written."""
        return self._hash.digest()

    def sync(self) -> None:
        """Have it all on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise unavailable(error) from error

    def close(self) -> None:
        """May be called again."""
        with contextlib.suppress(OSError):  # what could not be flushed is thrown away
            self._file.close()
        self.path.unlink(missing_ok=True)


class Files:
    """Thread-safe."""

    def __init__(
        self,
        directory: Path,
        store: Store,
        *,
        max_file_bytes: int,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._directory, self._store, self._clock = directory, store, clock
        self._max_file_bytes, self._max_bytes = max_file_bytes, max_bytes
        self._lock = threading.Lock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept = self._clean_up()

    def _clean_up(self) -> int:
        kept = 0
        for path in self._directory.iterdir():
            if path.suffix == PARTIAL or self._store.get(path.name) is None:
                path.unlink(missing_ok=True)
            else:
                kept += path.stat().st_size
        return kept

    def upload(self, *, of_client: bool = True) -> Upload:
        """Room for new content. Raises Unavailable when a client has to wait for room."""
        if of_client and self._used() > self._max_bytes:
            raise Unavailable(
                f"the files here take more than {self._max_bytes // 10**6} MB; delete some, or "
                "wait until they expire",
                retry_after=60,
            )
        return Upload(self._directory, self._max_file_bytes if of_client else None)

    def add(
        self,
        upload: Upload,
        *,
        owner: str,
        filename: str,
        purpose: str,
        keep_s: float,
        once: str = "",
        digest: bytes = b"",
        file_id: str = "",
        lease: Lease | None = None,
    ) -> Job:
        """Keep what was uploaded. Returns the file's job, or the earlier one that has the name in
        `once` or the same `file_id`: that keeps its content. Raises Unavailable, and then nothing
        is kept; with the `lease` of a job that makes the file also LeaseLost and PutBack."""
        upload.sync()
        now = self._clock()
        job = Job(
            id=file_id or f"file-{secrets.token_hex(12)}",
            kind="file",
            owner=owner,
            created=now,
            request=msgspec.json.encode(FileInfo(filename, purpose, upload.bytes)),
            keep_s=keep_s,
            lane=Lane.BATCH,
            once=once,
            digest=digest,
            status="completed",
            finished=now,
        )
        return self._put(upload, job, lease)

    def _put(self, upload: Upload, job: Job, lease: Lease | None) -> Job:
        if lease is not None:
            lease.check()
            if (known := self._store.get(job.id)) is not None:  # of an earlier attempt
                return known
        self._keep(upload, job.id)
        try:
            stored = self._store.put(job)
        except BaseException:
            self._remove(job.id)
            raise
        if stored.id != job.id:
            self._remove(job.id)
        return stored

    def _keep(self, upload: Upload, file_id: str) -> None:
        try:
            os.replace(upload.path, self._directory / file_id)
            _sync_directory(self._directory)
        except OSError as error:
            raise unavailable(error) from error
        self._count(upload.bytes)

    def open(self, file_id: str) -> BinaryIO:
        """The content. Raises NotFound."""
        try:
            return open(self._directory / file_id, "rb")  # the caller's
        except FileNotFoundError:
            raise NotFound(f"the content of {file_id[:100]!r} is gone", param="id") from None

    def delete(self, file_id: str) -> None:
        if self._store.delete(file_id):
            self.forget([file_id])

    def forget(self, gone: Iterable[str]) -> None:
        """Remove the content of what the store has forgotten; other ids are left alone."""
        for file_id in gone:
            self._remove(file_id)

    def _remove(self, file_id: str) -> None:
        path = self._directory / file_id
        with contextlib.suppress(FileNotFoundError):  # it was no file
            size = path.stat().st_size
            path.unlink()
            self._count(-size)

    def _used(self) -> int:
        """Bytes of all files."""
        return self._kept

    def _count(self, size: int) -> None:
        with self._lock:
            self._kept += size


def info_of(job: Job) -> FileInfo:
    """Of a file's job."""
    return msgspec.json.decode(job.request, type=FileInfo)


def unavailable(error: OSError) -> StoreUnavailable:
    """What a client is told when the disk refuses."""
    return StoreUnavailable(
        f"the file can't be kept: {error.strerror}; nothing was stored; try again later, or tell "
        "the operator",
        retry_after=30,
    )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
