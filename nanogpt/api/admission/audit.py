"""The audit log: one JSON line for each decision. Never a prompt, never a key.

Whatever a client sent (user, request id) is only ever a JSON string of bounded length in ASCII, so
it can neither end a line nor steer a terminal.
"""

import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

import msgspec

from nanogpt.admission_config import AdmissionConfig
from nanogpt.errors import StartupError

log = logging.getLogger("admission")

MAX_CHARS = 300  # of any text in an entry
TAIL_BYTES = 4 * 2**20  # of each file, when its last entries are wanted


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One decision. What does not apply is left out."""

    time: float = 0.0  # seconds since the epoch
    # admitted, refused, cooldown, ban, unban; gave_up: a pattern took too long and was no match;
    # create, revoke: a key
    decision: str = ""
    code: str = ""  # of the error: invalid_api_key, user_banned, requests, …
    request_id: str = ""
    key: str = ""  # its name
    user: str = ""
    model: str = ""
    rule: str = ""
    reason: str = ""
    by: str = ""  # the operator
    dry_run: bool = False  # a rule only reported it
    prompt_tokens: int | None = None
    remaining_requests: int | None = None
    remaining_tokens: int | None = None


class AuditLog:
    """Thread-safe, and several processes may write to one file.

    A write that fails is counted and reported once, and stops no request.
    """

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handler = _SharedFile(path, max_bytes, backups)
        except OSError as error:
            raise StartupError(
                f"can't write the audit log {path}: {error.strerror}; "
                "choose another with admission.audit_file, or set admission.audit to false"
            ) from error

    @property
    def failures(self) -> int:
        return self._handler.failures

    def write(self, entry: Entry) -> None:
        self._handler.handle(logging.makeLogRecord({"msg": line(entry)}))

    def close(self) -> None:
        try:
            self._handler.close()
        except OSError as error:  # what could not be written before can't be now
            self._handler.failed(error)


def open_audit(config: AdmissionConfig) -> AuditLog | None:
    """None when it is turned off. Raises StartupError."""
    path = config.audit_path
    if path is None:
        return None
    return AuditLog(path, config.audit_max_mib * 2**20, config.audit_backups)


def line(entry: Entry) -> str:
    """The entry as ASCII JSON without control characters."""
    fields = msgspec.to_builtins(entry)
    for name, value in fields.items():
        if isinstance(value, str) and len(value) > MAX_CHARS:
            fields[name] = value[: MAX_CHARS - 1] + "…"
    return json.dumps(fields, separators=(",", ":"))


def last_entries(path: Path, user: str, key: str | None, count: int) -> list[Entry]:
    """The newest entries of a user, under one key or any (None), newest first."""
    found: list[Entry] = []
    for file in (path, path.with_name(path.name + ".1")):
        for text in _lines_backwards(file):
            try:
                entry = msgspec.json.decode(text, type=Entry)
            except msgspec.DecodeError:
                continue  # the first piece of the tail, or a line cut by a full disk
            if entry.user == user and key in (None, entry.key):
                found.append(entry)
                if len(found) == count:
                    return found
    return found


def _lines_backwards(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            yield from reversed(file.read().splitlines())
    except FileNotFoundError:
        return


class _SharedFile(RotatingFileHandler):
    """A rotating file that other processes may rotate, too: a lock decides who does it."""

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        self._lock_path = f"{path}.lock"
        self.failures = 0
        super().__init__(path, maxBytes=max_bytes, backupCount=backups, encoding="ascii")

    def _open(self) -> Any:
        def private(name: str, flags: int) -> int:
            return os.open(name, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=private)

    def shouldRollover(self, record: logging.LogRecord) -> int:
        self._follow()
        return int(super().shouldRollover(record))

    def doRollover(self) -> None:
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._follow():
                super().doRollover()
        finally:
            os.close(lock)

    def _follow(self) -> bool:
        """Open the file anew when another process has put a new one in its place."""
        stream: IO[str] | None = self.stream
        if stream is None:
            return False
        try:
            there = os.stat(self.baseFilename)
        except FileNotFoundError:
            there = None
        here = os.fstat(stream.fileno())
        if there is not None and (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            return False
        stream.close()
        self.stream = None  # if opening fails now, the next entry tries again
        self.stream = self._open()
        return True

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed(sys.exception())

    def failed(self, error: BaseException | None) -> None:
        self.failures += 1
        if self.failures == 1:
            log.error(
                "can't write the audit log %s (%s); further failures are only counted",
                self.baseFilename,
                error,
            )
