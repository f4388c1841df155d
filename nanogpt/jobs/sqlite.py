"""Jobs in one SQLite file, for one server: see database.py for how it is written.

At opening every lease is a dead one's, since the file was its holder's alone: those jobs can be
claimed at once.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nanogpt.jobs.database import Database
from nanogpt.jobs.store import (
    CROWDED,
    ONCE_S,
    SWEEP_JOBS,
    Count,
    Job,
    Kind,
    Lane,
    Status,
    Verdict,
    too_large,
    too_many,
)
from nanogpt.jobs_config import JobsConfig

VERSION = 1  # of the tables below
_TABLES = """
CREATE TABLE jobs (
    n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
    owner TEXT NOT NULL, created REAL NOT NULL, request BLOB NOT NULL, keep_s REAL NOT NULL,
    lane INTEGER NOT NULL, once TEXT UNIQUE, digest BLOB NOT NULL, status TEXT NOT NULL,
    fence INTEGER NOT NULL, tries INTEGER NOT NULL, cancelled REAL, started REAL, finished REAL,
    state BLOB NOT NULL, result BLOB NOT NULL, lease_until REAL NOT NULL, records INTEGER NOT NULL,
    expires REAL
);
CREATE INDEX jobs_open ON jobs (lane, n) WHERE status IN ('queued', 'in_progress');
CREATE INDEX jobs_of_owner ON jobs (kind, owner, n);
CREATE INDEX jobs_by_kind ON jobs (kind, n);
CREATE INDEX jobs_by_end ON jobs (expires) WHERE expires IS NOT NULL;
CREATE TABLE records (
    job INTEGER NOT NULL, seq INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (job, seq)
) WITHOUT ROWID;
"""
_FIELDS = tuple(field.name for field in msgspec.structs.fields(Job))
_COLUMNS = ", ".join(_FIELDS)
_OPEN = "status IN ('queued', 'in_progress')"


def open_store(config: JobsConfig, directory: Path) -> "SqliteStore":
    """The store in this directory, which is made if need be. Raises StartupError."""
    return SqliteStore(
        directory,
        max_queued=config.max_queued,
        max_bytes=config.max_store_mb * 10**6,
    )


class SqliteStore:
    """See Store. Raises StartupError when the directory can't be used."""

    shared = False

    def __init__(
        self,
        directory: Path,
        *,
        max_queued: int,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_queued, self._max_bytes, self._clock = max_queued, max_bytes, clock
        self._db = Database(directory, "jobs.sqlite", _TABLES, VERSION)
        with contextlib.suppress(sqlite3.Error):  # on a full disk: they run out by themselves
            self._db.execute("UPDATE jobs SET lease_until = 0 WHERE status = 'in_progress'")
        self.close = self._db.close

    def check(self) -> None:
        """That it can be read. Raises StoreUnavailable."""
        self.counts()

    def put(self, job: Job) -> Job:
        def change(db: sqlite3.Connection) -> Job:
            known = self._named(db, job.once)
            if known is not None:
                return known
            self._check_room(db, job)
            values = {**msgspec.structs.asdict(job), "once": job.once or None}
            ended = job.ended
            values |= {"lease_until": 0.0, "records": 0}
            values["expires"] = job.created + job.keep_s if ended else None
            names = ", ".join(values)
            marks = ", ".join(f":{name}" for name in values)
            db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", values)
            self._db.touch(job.id)
            return job

        return self._db.write(change)

    def _check_room(self, db: sqlite3.Connection, job: Job) -> None:
        if not job.ended:
            (queued,) = db.execute(f"SELECT count(*) FROM jobs WHERE {_OPEN}").fetchone()
            if queued >= self._max_queued:
                raise too_many(queued, self._max_queued)
        if _used_bytes(db) > self._max_bytes:
            raise too_large(self._max_bytes)

    def _named(self, db: sqlite3.Connection, once: str) -> Job | None:
        if not once:
            return None
        job = _one(db, "WHERE once = ?", once)
        if job is not None and job.created + ONCE_S <= self._clock():
            db.execute("UPDATE jobs SET once = NULL WHERE once = ?", (once,))
            return None
        return job

    def claim(self, last: Lane, lease_s: float, timeout_s: float) -> Job | None:
        end = time.monotonic() + timeout_s
        with self._db.waiting("") as news:
            while True:
                news.clear()
                if self._claimable(last) and (job := self._claim(last, lease_s)) is not None:
                    return job
                left = end - time.monotonic()
                if left <= 0 or not news.wait(left) or time.monotonic() >= end:
                    return None

    _CLAIM = (
        "WHERE lane <= ? AND (status = 'queued' OR (status = 'in_progress' AND lease_until <= ?)) "
        f"AND {_OPEN} ORDER BY lane, n LIMIT 1"
    )

    def _claimable(self, last: Lane) -> bool:
        with self._db.reading() as db:
            query = f"SELECT 1 FROM jobs {self._CLAIM}"
            return db.execute(query, (last, self._clock())).fetchone() is not None

    def _claim(self, last: Lane, lease_s: float) -> Job | None:
        def change(db: sqlite3.Connection) -> Job | None:
            now = self._clock()
            job = _one(db, self._CLAIM, last, now)
            if job is None:
                return None
            db.execute(
                "UPDATE jobs SET status = 'in_progress', fence = fence + 1, tries = tries + 1, "
                "started = coalesce(started, ?), lease_until = ? WHERE id = ?",
                (now, now + lease_s, job.id),
            )
            self._db.touch(job.id)
            return _one(db, "WHERE id = ?", job.id)

        return self._db.write(change)

    def renew(self, held: Mapping[str, int], lease_s: float) -> dict[str, Verdict]:
        def change(db: sqlite3.Connection) -> dict[str, Verdict]:
            until = self._clock() + lease_s if lease_s else 0.0
            back = ", tries = 0" if not lease_s else ""
            verdicts = {}
            for job_id, fence in held.items():
                verdicts[job_id] = _verdict(db, job_id, fence)
                if verdicts[job_id] != "lost":
                    db.execute(
                        f"UPDATE jobs SET lease_until = ?{back} WHERE id = ?", (until, job_id)
                    )
                    if not lease_s:
                        self._db.touch(job_id)
            return verdicts

        return self._db.write(change) if held else {}

    def append(
        self, job_id: str, fence: int, records: Sequence[bytes], state: bytes | None = None
    ) -> Verdict:
        def change(db: sqlite3.Connection) -> Verdict:
            verdict = _verdict(db, job_id, fence)
            if verdict != "lost":
                self._add(db, job_id, records, state)
            return verdict

        return self._db.write(change)

    def _add(
        self, db: sqlite3.Connection, job_id: str, records: Sequence[bytes], state: bytes | None
    ) -> None:
        n, first = db.execute("SELECT n, records FROM jobs WHERE id = ?", (job_id,)).fetchone()
        rows = ((n, first + i, data) for i, data in enumerate(records))
        db.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
        db.execute(
            "UPDATE jobs SET records = records + ?, tries = 0, state = coalesce(?, state) "
            "WHERE n = ?",
            (len(records), state, n),
        )
        self._db.touch(job_id)

    def complete(
        self,
        job_id: str,
        fence: int,
        status: Status,
        result: bytes,
        *,
        records: Sequence[bytes] = (),
        state: bytes | None = None,
        forget_records: bool = False,
    ) -> bool:
        def change(db: sqlite3.Connection) -> bool:
            if _verdict(db, job_id, fence) == "lost":
                return False
            self._add(db, job_id, records, state)
            if forget_records:
                _delete_records(db, job_id)
            self._end(db, job_id, status, result)
            return True

        return self._db.write(change)

    def _end(self, db: sqlite3.Connection, job_id: str, status: Status, result: bytes) -> None:
        now = self._clock()
        db.execute(
            "UPDATE jobs SET status = ?, result = ?, finished = ?, expires = ? + keep_s "
            "WHERE id = ?",
            (status, result, now, now, job_id),
        )
        self._db.touch(job_id)

    def get(self, job_id: str) -> Job | None:
        with self._db.reading() as db:
            return _one(db, "WHERE id = ?", job_id)

    def find(self, once: str) -> Job | None:
        with self._db.reading() as db:
            job = _one(db, "WHERE once = ?", once)
        forgotten = job is not None and job.created + ONCE_S <= self._clock()
        return None if forgotten else job

    def read(
        self, job_id: str, after: int, timeout_s: float = 0.0, limit: int = 1000
    ) -> tuple[Job | None, list[bytes]]:
        end = time.monotonic() + timeout_s
        with self._db.waiting(job_id) as news:
            while True:
                news.clear()
                job, records = self._read(job_id, after, limit)
                left = end - time.monotonic()
                if records or job is None or job.ended or left <= 0:
                    return job, records
                news.wait(left)

    def _read(self, job_id: str, after: int, limit: int) -> tuple[Job | None, list[bytes]]:
        with self._db.reading() as db:
            db.execute("BEGIN")
            try:
                job = _one(db, "WHERE id = ?", job_id)
                rows = db.execute(
                    "SELECT data FROM records WHERE job = (SELECT n FROM jobs WHERE id = ?) "
                    "AND seq >= ? ORDER BY seq LIMIT ?",
                    (job_id, after, limit),
                )
                return job, [data for (data,) in rows]
            finally:
                db.execute("ROLLBACK")

    def cancel(self, job_id: str) -> Job | None:
        def change(db: sqlite3.Connection) -> Job | None:
            job = _one(db, "WHERE id = ?", job_id)
            if job is None or job.ended or job.cancelled is not None:
                return job
            db.execute("UPDATE jobs SET cancelled = ? WHERE id = ?", (self._clock(), job_id))
            if job.status == "queued":
                self._end(db, job_id, "cancelled", b"")
            self._db.touch(job_id)
            return _one(db, "WHERE id = ?", job_id)

        return self._db.write(change)

    def delete(self, job_id: str) -> bool:
        def change(db: sqlite3.Connection) -> bool:
            _delete_records(db, job_id)
            found = db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount > 0
            self._db.touch(job_id)
            return found

        return self._db.write(change)

    def page(
        self, kind: Kind, owner: str | None, *, after: str, limit: int, newest: bool
    ) -> list[Job]:
        order, beyond = ("DESC", "<") if newest else ("ASC", ">")
        where, values = "WHERE kind = ?", [str(kind)]
        if owner is not None:
            where, values = f"{where} AND owner = ?", [*values, owner]
        if after:
            where = f"{where} AND n {beyond} (SELECT n FROM jobs WHERE id = ?)"
            values = [*values, after]
        with self._db.reading() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM jobs {where} ORDER BY n {order} LIMIT ?", (*values, limit)
            )
            return [_job(row) for row in rows]

    def counts(self) -> list[Count]:
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT lane, status, count(*) FROM jobs WHERE kind != 'file' GROUP BY 1, 2"
            )
            return [Count(Lane(lane), status, jobs) for lane, status, jobs in rows]

    def sweep(self) -> list[str]:
        def change(db: sqlite3.Connection) -> list[str]:
            rows = db.execute(
                "SELECT id FROM jobs WHERE expires <= ? ORDER BY expires LIMIT ?",
                (self._clock(), SWEEP_JOBS),
            ).fetchall()
            if not rows and _used_bytes(db) > CROWDED * self._max_bytes:
                rows = db.execute(
                    "SELECT id FROM jobs WHERE lane = ? AND expires IS NOT NULL "
                    "ORDER BY expires LIMIT ?",
                    (Lane.NOW, SWEEP_JOBS),
                ).fetchall()
            for (job_id,) in rows:
                _delete_records(db, job_id)
                db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
                self._db.touch(job_id)
            return [job_id for (job_id,) in rows]

        gone = self._db.write(change)
        if gone:
            self._db.execute(f"PRAGMA incremental_vacuum({SWEEP_JOBS})")
        return gone


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip(_FIELDS, row, strict=True))
    return Job(**{**values, "lane": Lane(values["lane"]), "once": values["once"] or ""})


def _one(db: sqlite3.Connection, where: str, *values: Any) -> Job | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values).fetchone()
    return None if row is None else _job(row)


def _verdict(db: sqlite3.Connection, job_id: str, fence: int) -> Verdict:
    row = db.execute(
        "SELECT cancelled FROM jobs WHERE id = ? AND fence = ? AND status = 'in_progress'",
        (job_id, fence),
    ).fetchone()
    if row is None:
        return "lost"
    return "held" if row[0] is None else "cancelled"


def _delete_records(db: sqlite3.Connection, job_id: str) -> None:
    db.execute("DELETE FROM records WHERE job = (SELECT n FROM jobs WHERE id = ?)", (job_id,))


def _used_bytes(db: sqlite3.Connection) -> int:
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size
