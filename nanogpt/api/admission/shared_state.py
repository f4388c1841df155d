"""A state file whose bans are those that servers share through Redis.

Redis has the truth; the file is a copy of it, which holds while Redis is away. What is changed here
meanwhile is noted in the file beside it, and told to Redis when that is back. A Redis without what
the file is a copy of (a new one, or one that lost its data) gets the bans of the file.

Keys stay with their machine.
"""

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable

import msgspec

from nanogpt.api.admission.bans import Ban
from nanogpt.api.admission.shared_bans import BansUnavailable, SharedBans, Version
from nanogpt.api.admission.state import State
from nanogpt.api.admission.subject import Subject

log = logging.getLogger("admission")

LOOK_S = 0.5  # between two looks for changes of others


class Change(msgspec.Struct, frozen=True):
    """A ban, or (without one) the end of all that `key` and `user` mean to State.lift."""

    time: float  # seconds since the epoch
    key: str
    user: str
    ban: Ban | None = None
    replace: bool = True


class SharedState(State):
    """See State. Closes `shared`. Several processes of a machine may have the same file."""

    def __init__(
        self, path: str, shared: SharedBans, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(path)
        self._shared, self._time = shared, clock
        self._synced: Version | None = None
        self._copied = 0
        self._stop = threading.Event()
        self._adopt()
        self._thread = threading.Thread(target=self._run, name="bans", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(BansUnavailable, sqlite3.Error):
            if self._has_unsent():
                self._sync()
        self._shared.close()
        super().close()

    def version(self) -> int:
        """See State: what others changed comes in by the same connection to the file."""
        return super().version() + (self._copied << 32)

    def put_ban(self, ban: Ban, *, replace: bool) -> None:
        with self._transaction() as db:
            self._write_ban(db, ban, replace=replace)
            self._note(db, Change(ban.created, ban.key, ban.user, ban, replace))
        self._try_sync()

    def lift(self, subject: Subject, now: float) -> list[Ban]:
        with self._transaction() as db:
            lifted = self._delete_bans(db, subject)
            # By whichever server's clock they were made: it is these that are meant.
            latest = max([now, *(ban.created for ban in lifted)])
            self._note(db, Change(latest, *subject))
        self._try_sync()
        return [ban for ban in lifted if ban.holds(now)]

    def _note(self, db: sqlite3.Connection, change: Change) -> None:
        db.execute("INSERT INTO unsent VALUES (?)", (msgspec.json.encode(change),))

    def _has_unsent(self) -> bool:
        with self._lock:
            return self._db.execute("SELECT 1 FROM unsent").fetchone() is not None

    def _adopt(self) -> None:
        """From here on the file is a copy. Bans of its own go to Redis; those of another queue,
        of which it was a copy before, don't."""
        with self._transaction() as db:
            queue, _ = self._copy_of(db)
            if queue == self._shared.queue:
                return
            bans = self._read_bans(db, self._time())
            if queue:
                db.execute("DELETE FROM bans")
                db.execute("DELETE FROM unsent")
                log.warning("%d bans of the queue %s do not hold here any more", len(bans), queue)
            else:
                for ban in bans:
                    self._note(db, Change(ban.created, ban.key, ban.user, ban, replace=False))
            self._set_copy_of(db, self._shared.queue, "")

    # The copy

    def _run(self) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                if self._shared.version() != self._synced or self._has_unsent():
                    self._sync()
                failing = False
            except (BansUnavailable, sqlite3.Error) as error:
                if not failing:
                    log.error("bans are not shared for the moment: %s", error)
                failing = True
            self._stop.wait(LOOK_S)

    def _try_sync(self) -> None:
        with contextlib.suppress(BansUnavailable, sqlite3.Error):  # the thread tries again
            self._shared.version()  # not with the file locked, should it take its time
            self._sync()

    def _sync(self) -> None:
        """Tell Redis what it does not know, and copy what it has. In one transaction: processes
        that share the file do so one after the other."""
        now = self._time()
        with self._transaction() as db:
            queue, born = self._copy_of(db)
            version, bans = self._shared.read(now)
            own = self._read_bans(db, now)
            unsent = db.execute("SELECT change FROM unsent ORDER BY rowid").fetchall()
            if version.born != born:
                for ban in own if born else ():
                    self._shared.put(ban, replace=False)
                self._set_copy_of(db, queue, version.born)
            for (text,) in unsent:
                self._carry_out(msgspec.json.decode(text, type=Change))
            if unsent or version.born != born:
                version, bans = self._shared.read(now)
                db.execute("DELETE FROM unsent")
            if set(bans) != set(own):
                self._copy(db, own, bans)
        self._synced = version

    def _copy(self, db: sqlite3.Connection, own: list[Ban], bans: list[Ban]) -> None:
        left = {(ban.subject, ban.kind) for ban in bans}
        for ban in own:
            if (ban.subject, ban.kind) not in left:  # lifted elsewhere, with what led to it
                self._delete_bans(db, ban.subject)
        db.execute("DELETE FROM bans")
        for ban in bans:
            self._write_ban(db, ban, replace=True)
        self._copied += 1

    def _carry_out(self, change: Change) -> None:
        if change.ban is None:
            self._shared.lift(Subject(change.key, change.user), change.time)
        elif change.ban.holds(self._time()):
            self._shared.put(change.ban, replace=change.replace)


class OperatorState(State):
    """See State. For a command, which must know whether it is done: its bans are those in Redis,
    without a copy. Raises BansUnavailable. Closes `shared`."""

    def __init__(self, path: str, shared: SharedBans) -> None:
        super().__init__(path)
        self._shared = shared

    def close(self) -> None:
        self._shared.close()
        super().close()

    def bans(self, now: float) -> list[Ban]:
        return sorted(self._shared.read(now)[1], key=lambda ban: (ban.created, *ban.subject))

    def put_ban(self, ban: Ban, *, replace: bool) -> None:
        self._shared.put(ban, replace=replace)

    def lift(self, subject: Subject, now: float) -> list[Ban]:
        lifted = self._shared.lift(subject)
        super().lift(subject, now)  # and what led to them
        return [ban for ban in lifted if ban.holds(now)]
