"""One SQLite file of one process: writes in groups, reads beside them, threads that wait for news.

Whoever gets the lock carries out, in one transaction, all writes that threads have asked for
meanwhile. So hundreds of jobs share a disk flush (WAL with synchronous = FULL flushes at each
commit, and what is committed survives a loss of power).

The file belongs to one process at a time, by a lock that the kernel drops when that process ends,
however it ends.
"""

import fcntl
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from nanogpt.errors import StartupError
from nanogpt.jobs.store import StoreUnavailable

LOCK_WAIT_S = 5.0  # for the lock of a process that is just ending
MAX_JOURNAL_BYTES = 64 * 2**20  # that the write-ahead log keeps when it is empty

T = TypeVar("T")


class _Write(Generic[T]):
    """One change that a thread waits for."""

    def __init__(self, change: Callable[[sqlite3.Connection], T]) -> None:
        self._change = change
        self._value: T | None = None
        self.error: Exception | None = None
        self.done = False

    def run(self, db: sqlite3.Connection) -> None:
        """Raises sqlite3.Error when SQLite has rolled the whole transaction back."""
        db.execute("SAVEPOINT one")
        try:
            self._value = self._change(db)
        except Exception as error:
            if not db.in_transaction:
                raise
            db.execute("ROLLBACK TO one")
            self.error = error
        db.execute("RELEASE one")

    def value(self) -> T:
        if self.error is not None:
            raise self.error
        return self._value  # type: ignore[return-value]


class Database:
    """Thread-safe. Raises StartupError when the directory can't be used.

    `version` is that of the `tables`: SQL that makes them in a new file.
    """

    def __init__(self, directory: Path, name: str, tables: str, version: int) -> None:
        self._path, self._tables, self._version = directory / name, tables, version
        self._writes: deque[_Write[Any]] = deque()
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        self._waiters: dict[str, set[threading.Event]] = {}  # of a row; of any row under ""
        self._waiters_lock = threading.Lock()
        self._touched: set[str] = set()  # rows that the transaction has changed
        self._lock_fd = _lock(directory)
        try:
            self._db, self._reader = self._open(), self._open()
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock_fd)
            raise StartupError(f"can't keep jobs in {directory}: {error}") from error
        except StartupError:
            os.close(self._lock_fd)
            raise

    def _open(self) -> sqlite3.Connection:
        os.close(
            os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )  # it has prompts
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {MAX_JOURNAL_BYTES}")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.executescript(
                f"BEGIN; {self._tables} PRAGMA user_version = {self._version}; COMMIT;"
            )
        elif version != self._version:
            raise StartupError(
                f"{self._path} is not a job file of this version (it says {version}, "
                f"expected {self._version}); set jobs.path to another directory"
            )
        return db

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._db.close()
            self._reader.close()
            os.close(self._lock_fd)

    def touch(self, row: str) -> None:
        """In a write: whoever waits for the row is woken when it is committed."""
        self._touched.add(row)

    def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        write = _Write(change)
        self._writes.append(write)
        with self._write_lock:
            if not write.done:
                self._commit_all()
        return write.value()

    def _commit_all(self) -> None:
        group: list[_Write[Any]] = []
        while self._writes:
            group.append(self._writes.popleft())
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for write in group:
                write.run(self._db)
            self._db.execute("COMMIT")
        except Exception as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._touched.clear()
            for write in group:
                write.error = error
        for write in group:
            if isinstance(write.error, sqlite3.Error):
                write.error = _unavailable(write.error)
            write.done = True
        self._tell()

    def _tell(self) -> None:
        with self._waiters_lock:
            for row in self._touched and {*self._touched, ""}:
                for news in self._waiters.get(row, ()):
                    news.set()
        self._touched.clear()

    @contextmanager
    def waiting(self, row: str) -> Iterator[threading.Event]:
        """An event that is set when the row has changed; any row, for ""."""
        news = threading.Event()
        with self._waiters_lock:
            self._waiters.setdefault(row, set()).add(news)
        try:
            yield news
        finally:
            with self._waiters_lock:
                self._waiters[row].discard(news)
                if not self._waiters[row]:
                    del self._waiters[row]

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock:
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise _unavailable(error) from error

    def execute(self, statement: str) -> Iterable[Any]:
        """Outside of transactions."""
        with self._write_lock:
            return self._db.execute(statement).fetchall()


def _unavailable(error: sqlite3.Error) -> StoreUnavailable:
    full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
    problem = "the disk is full" if full else f"the job store fails ({error})"
    return StoreUnavailable(
        f"{problem}: nothing was accepted; try again later, or tell the operator", retry_after=30
    )


def _lock(directory: Path) -> int:
    """Take the directory for this process. Raises StartupError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(
            f"can't keep jobs in {directory}: {error.strerror}; set jobs.path to another directory"
        ) from error
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(fd)
                raise StartupError(
                    f"another server keeps its jobs in {directory}; set jobs.path to another"
                ) from None
            time.sleep(0.05)
