"""What outlives the process: API keys, bans, and what the rules did. One SQLite file.

Every process that opens the file sees the changes of the others: `changed` asks SQLite whether
another connection committed, which costs microseconds.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from nanogpt.admission_config import MEMORY_STATE, KeyConfig
from nanogpt.api.admission.bans import Ban, Kind
from nanogpt.api.admission.keys import Key
from nanogpt.api.admission.subject import Subject
from nanogpt.errors import ConfigError, StartupError

VERSION = 1  # PRAGMA user_version of the tables below
BUSY_S = 5.0  # how long a write waits for another process's
_TABLES = """
CREATE TABLE keys (
    sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, settings TEXT NOT NULL,
    created REAL NOT NULL, revoked REAL
) WITHOUT ROWID;
CREATE TABLE bans (
    key TEXT NOT NULL, user TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL,
    by TEXT NOT NULL, created REAL NOT NULL, until REAL, PRIMARY KEY (key, user, kind)
) WITHOUT ROWID;
CREATE TABLE actions (
    time REAL NOT NULL, key TEXT NOT NULL, user TEXT NOT NULL, rule TEXT NOT NULL,
    kind TEXT NOT NULL, reason TEXT NOT NULL, dry_run INTEGER NOT NULL
);
CREATE INDEX actions_of_subject ON actions (key, user, time);
CREATE INDEX actions_by_time ON actions (time);
"""
# What SharedState needs. Files from before it have none of these.
_SHARED_TABLES = """
CREATE TABLE IF NOT EXISTS copy_of (queue TEXT NOT NULL, born TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS unsent (change BLOB NOT NULL);
"""


class Action(msgspec.Struct, frozen=True):
    """A rule's cool-down or ban."""

    time: float  # seconds since the epoch
    key: str
    user: str
    rule: str
    kind: Kind
    reason: str
    dry_run: bool = False  # it was only reported


class State:
    """Thread-safe. Raises StartupError when the file can't be opened or is not ours."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._held: list[Ban] = []
        self._lock = threading.Lock()
        try:
            if path != MEMORY_STATE:
                _make_private(Path(path))
            self._db = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        try:
            self._set_up()
            self._identity = _identity(path)
        except (sqlite3.Error, StartupError) as error:
            self._db.close()
            if isinstance(error, StartupError):
                raise
            raise _unusable(path, error) from error

    def _set_up(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in filter(str.strip, _TABLES.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise StartupError(
                    f"{self.path} is not a state file of this version (it says {version}, "
                    f"expected {VERSION}); use another path"
                )
            for statement in filter(str.strip, _SHARED_TABLES.split(";")):
                db.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def version(self) -> int:
        """Another number whenever another connection has changed the file. Raises StartupError when
        another file has taken its place: nobody else sees the one that is open here.
        """
        if self.path != MEMORY_STATE and _identity(self.path) != self._identity:
            raise StartupError("it was replaced or removed: start the server again")
        with self._lock:
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
        return int(version)

    # Keys

    def api_keys(self) -> list[Key]:
        with self._lock:
            rows = self._db.execute(
                "SELECT name, settings, created, revoked FROM keys ORDER BY created, name"
            ).fetchall()
        return [self._key(*row) for row in rows]

    def _key(self, name: str, settings: str, created: float, revoked: float | None) -> Key:
        try:
            decoded = msgspec.json.decode(settings, type=KeyConfig)
        except msgspec.MsgspecError as error:
            raise StartupError(f"{self.path}: the key {name!r} can't be read: {error}") from error
        return Key(name=name, settings=decoded, created=created, revoked=revoked)

    def add_key(self, key: Key) -> None:
        """Raises ConfigError when a valid key has this name."""
        with self._transaction() as db:
            taken = "SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL"
            if db.execute(taken, (key.name,)).fetchone():
                raise ConfigError(f"there is a key {key.name!r} already; revoke it first")
            settings = msgspec.json.encode(key.settings).decode()
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, NULL)",
                (key.settings.sha256, key.name, settings, key.created),
            )

    def revoke_key(self, name: str, now: float) -> bool:
        """False when there is no valid key of this name."""
        with self._transaction() as db:
            update = "UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL"
            return db.execute(update, (now, name)).rowcount > 0

    # Bans

    def bans(self, now: float) -> list[Ban]:
        """Those in force."""
        with self._lock:
            written = self._read_bans(self._db, now)
            return [*written, *(ban for ban in self._held if ban.holds(now))]

    def _read_bans(self, db: sqlite3.Connection, now: float) -> list[Ban]:
        rows = db.execute(
            "SELECT key, user, kind, reason, by, created, until FROM bans "
            "WHERE until IS NULL OR until > ? ORDER BY created, key, user, kind",
            (now,),
        ).fetchall()
        return [Ban(*row) for row in rows]

    def hold(self, ban: Ban) -> None:
        """Keep a ban that `put_ban` can't write, until it ends or this process does."""
        with self._lock:
            self._held = [*(b for b in self._held if b.holds(ban.created)), ban]

    def put_ban(self, ban: Ban, *, replace: bool) -> None:
        """Forgets those that have expired. One of the same subject and kind is replaced, or (not
        `replace`) stays when it lasts longer: no rule shortens what an operator said.
        """
        with self._transaction() as db:
            self._write_ban(db, ban, replace=replace)

    def _write_ban(self, db: sqlite3.Connection, ban: Ban, *, replace: bool) -> None:
        longer = "excluded.until IS NULL OR excluded.until > until"
        db.execute("DELETE FROM bans WHERE until <= ?", (ban.created,))
        db.execute(
            "INSERT INTO bans VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "reason = excluded.reason, by = excluded.by, created = excluded.created, "
            f"until = excluded.until {'' if replace else 'WHERE ' + longer}",
            msgspec.structs.astuple(ban),
        )

    def lift(self, subject: Subject, now: float) -> list[Ban]:
        """End bans and cool-downs, and what led to them; returns those that were in force.

        A user with key "" is meant under every key, and for all keys.
        """
        with self._transaction() as db:
            lifted = self._delete_bans(db, subject)
        return [ban for ban in lifted if ban.holds(now)]

    def _delete_bans(self, db: sqlite3.Connection, subject: Subject) -> list[Ban]:
        assert subject != Subject("", ""), "nobody"
        where = "WHERE user = ?2 AND (key = ?1 OR (?1 = '' AND ?2 != ''))"
        rows = db.execute(
            f"DELETE FROM bans {where} RETURNING key, user, kind, reason, by, created, until",
            subject,
        ).fetchall()
        db.execute(f"DELETE FROM actions {where}", subject)
        lifted = [ban for ban in self._held if is_meant(ban.subject, subject)]
        self._held = [ban for ban in self._held if ban not in lifted]
        return [*(Ban(*row) for row in rows), *lifted]

    # Whose they are

    @property
    def copy_of(self) -> str:
        """The queue of which the bans here are a copy (see SharedState); empty: our own."""
        with self._lock:
            return self._copy_of(self._db)[0]

    def own(self) -> None:
        """From here on the bans are our own, whatever they were."""
        with self._transaction() as db:
            db.execute("DELETE FROM copy_of")
            db.execute("DELETE FROM unsent")

    def _copy_of(self, db: sqlite3.Connection) -> tuple[str, str]:
        """The queue, and which of the lists of bans that it has had."""
        return db.execute("SELECT queue, born FROM copy_of").fetchone() or ("", "")

    def _set_copy_of(self, db: sqlite3.Connection, queue: str, born: str) -> None:
        db.execute("DELETE FROM copy_of")
        db.execute("INSERT INTO copy_of VALUES (?, ?)", (queue, born))

    # What rules did

    def add_action(self, action: Action, forget_before: float) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM actions WHERE time < ?", (forget_before,))
            db.execute(
                "INSERT INTO actions VALUES (?, ?, ?, ?, ?, ?, ?)",
                msgspec.structs.astuple(action),
            )

    def actions(self, since: float, user: str | None, key: str | None = None) -> list[Action]:
        """Oldest first, of one user and key, or of any (None)."""
        with self._lock:
            rows = self._db.execute(
                "SELECT time, key, user, rule, kind, reason, dry_run FROM actions WHERE time >= ?1 "
                "AND (?2 IS NULL OR user = ?2) AND (?3 IS NULL OR key = ?3) ORDER BY time",
                (since, user, key),
            ).fetchall()
        return [
            Action(time, key, user, rule, kind, reason, bool(dry_run))
            for time, key, user, rule, kind, reason, dry_run in rows
        ]


def _identity(path: str) -> tuple[int, int] | None:
    """Of the file at this path; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_meant(known: Subject, subject: Subject) -> bool:
    """As `lift` says it in SQL."""
    every_key = not subject.key and bool(subject.user)
    return known.user == subject.user and (every_key or known.key == subject.key)


def _make_private(path: Path) -> None:
    """The file with mode 0600 (SQLite gives its side files the same), and its directory."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)


def _unusable(path: str, error: Exception) -> StartupError:
    detail = error.strerror if isinstance(error, OSError) else str(error)
    return StartupError(
        f"can't use the state file {path}: {detail}; choose another with admission.state"
    )
