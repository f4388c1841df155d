"""Files of clients in Redis, for servers that share no disk.

    P:content:ID  list    the content in pieces
    P:contents    hash    its bytes, by file
    P:file-bytes  string  of all files

What is uploaded passes through a directory of this machine first, so that a broken upload never
reaches Redis. Content that did not get there whole goes away by itself.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from nanogpt.errors import NotFound
from nanogpt.jobs.files import Files, Upload
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.redis_link import Link

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
        self._link, self._prefix = store.link, f"{{{store.namespace}}}"
        super().__init__(
            directory, store, max_file_bytes=max_file_bytes, max_bytes=max_bytes, clock=clock
        )

    def _clean_up(self) -> int:
        """The directory may be shared by processes, and their uploads are their own."""
        return 0

    def _used(self) -> int:
        return int(self._link.command("GET", f"{self._prefix}:file-bytes") or 0)

    def _keep(self, upload: Upload, file_id: str) -> None:
        key = f"{self._prefix}:content:{file_id}"
        with upload.path.open("rb") as file:
            self._link.command("DEL", key)
            while piece := file.read(PIECE_BYTES):
                self._link.each(("RPUSH", key, piece), ("EXPIRE", key, ORPHAN_S))
        self._link.each(
            ("HSET", f"{self._prefix}:contents", file_id, upload.bytes),
            ("INCRBY", f"{self._prefix}:file-bytes", upload.bytes),
            ("PERSIST", key),
        )

    def open(self, file_id: str) -> BinaryIO:
        """Raises NotFound; StoreUnavailable, also while it is read."""
        if self._link.command("HGET", f"{self._prefix}:contents", file_id) is None:
            raise NotFound(f"the content of {file_id[:100]!r} is gone", param="id")
        content = _Content(self._link, f"{self._prefix}:content:{file_id}")
        return cast(BinaryIO, io.BufferedReader(content, PIECE_BYTES))

    def _remove(self, file_id: str) -> None:
        size = self._link.command("HGET", f"{self._prefix}:contents", file_id)
        if size is None:  # it was no file
            return
        if self._link.command("HDEL", f"{self._prefix}:contents", file_id):
            self._link.command("INCRBY", f"{self._prefix}:file-bytes", -int(size))
        self._link.command("DEL", f"{self._prefix}:content:{file_id}")


class _Content(io.RawIOBase):
    """Reads piece after piece."""

    def __init__(self, link: Link, key: str) -> None:
        self._link, self._key = link, key
        self._next = 0
        self._piece = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._piece = self._link.command("LINDEX", self._key, self._next) or b""
            self._next += 1
        size = min(len(buffer), len(self._piece))
        buffer[:size] = self._piece[:size]
        self._piece = self._piece[size:]
        return size
