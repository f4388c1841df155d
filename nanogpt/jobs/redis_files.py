"""Files of clients in Redis, for servers that share no disk: see redis_scripts.py for the keys.

What is uploaded passes through a directory of this machine first, so that a broken upload never
reaches Redis. There it is a part of its own, under a name that nobody else has and that goes away
by itself, until one step of the store makes it the content of a file, together with the file's
job. Content goes in one step with its job as well.
"""

import contextlib
import io
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from nanogpt.errors import NotFound
from nanogpt.jobs.files import PARTIAL, Files, Upload
from nanogpt.jobs.redis import Part, RedisStore
from nanogpt.jobs.redis_link import Link
from nanogpt.jobs.runner import Lease
from nanogpt.jobs.store import Job

PIECE_BYTES = 2**20
ORPHAN_S = 3600  # after this, content that did not get there whole is gone


class RedisFiles(Files):
    """See Files. `directory`: for uploads on their way."""

    def __init__(
        self,
        directory: Path,
        store: RedisStore,
        *,
        max_file_bytes: int,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._redis, self._link = store, store.link
        self._prefix = f"{{{store.namespace}}}"
        super().__init__(
            directory, store, max_file_bytes=max_file_bytes, max_bytes=max_bytes, clock=clock
        )

    def upload(self, *, of_client: bool = True) -> Upload:
        self._clean_up()
        return super().upload(of_client=of_client)

    def _clean_up(self) -> int:
        """Remove uploads of processes that were killed. Others may share the directory, so only
        what has been left alone for long."""
        for path in self._directory.glob(f"*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):  # another process has done with it
                if path.stat().st_mtime < self._clock() - ORPHAN_S:
                    path.unlink()
        return 0

    def _used(self) -> int:
        return int(self._link.command("GET", f"{self._prefix}:file-bytes") or 0)

    def _put(self, upload: Upload, job: Job, lease: Lease | None) -> Job:
        return self._redis.put_file(job, self._send(upload), lease)

    def _send(self, upload: Upload) -> Part:
        name, pieces = secrets.token_hex(16), 0
        key = f"{self._prefix}:part:{name}"
        with upload.path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                self._link.each(("RPUSH", key, piece), ("EXPIRE", key, ORPHAN_S))
                pieces += 1
        return Part(name, pieces, upload.bytes)

    def open(self, file_id: str) -> BinaryIO:
        """Raises NotFound and StoreUnavailable, also while it is read."""
        size = self._link.command("HGET", f"{self._prefix}:contents", file_id)
        if size is None:
            raise _gone(file_id)
        content = _Content(self._link, self._prefix, file_id, int(size))
        return cast(BinaryIO, io.BufferedReader(content, PIECE_BYTES))

    def forget(self, gone: Iterable[str]) -> None:
        """The store has removed the content with the jobs."""


class _Content(io.RawIOBase):
    """Reads piece after piece."""

    def __init__(self, link: Link, prefix: str, file_id: str, size: int) -> None:
        self._link, self._key = link, f"{prefix}:content:{file_id}"
        self._id, self._left = file_id, size
        self._next = 0
        self._piece = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece and self._left:
            piece = self._link.command("LINDEX", self._key, self._next)
            if piece is None:  # not the end, but deleted
                raise _gone(self._id)
            self._piece, self._next = piece, self._next + 1
        size = min(len(buffer), len(self._piece))
        buffer[:size] = self._piece[:size]
        self._piece = self._piece[size:]
        self._left -= size
        return size


def _gone(file_id: str) -> NotFound:
    return NotFound(f"the content of {file_id[:100]!r} is gone", param="id")
