"""Bans that servers share through Redis: each change is an entry of a stream, which every server
carries out in its own state file.

A server that was away reads what it missed; what came last to a subject counts. Keys, and bans that
`python -m nanogpt.admin` writes into a file, stay with their machine.
"""

import contextlib
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from nanogpt.api.admission.bans import Ban
from nanogpt.api.admission.state import State, is_meant
from nanogpt.api.admission.subject import Subject

log = logging.getLogger("admission")

STREAM = "nanogpt:bans"
MAX_CHANGES = 10_000  # that the stream keeps; older bans are known to the servers of their time
LOOK_S = 0.5  # between two looks for changes of others


class Change(msgspec.Struct, frozen=True):
    """A ban, or (without one) the end of all that `key` and `user` mean to State.lift."""

    origin: str  # which server made it
    time: float  # seconds since the epoch
    key: str
    user: str
    ban: Ban | None = None
    replace: bool = True


class SharedState(State):
    """See State. `client` is a connection to Redis, which this closes; while Redis is away changes
    are kept for it, and hold here."""

    def __init__(self, path: str, client: Any, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path)
        import redis  # it is there: it made the client

        self._client, self._error, self._time = client, redis.RedisError, clock
        self._origin = secrets.token_hex(8)
        self._last: bytes | str = "0"
        self._carried_out = 0
        self._unsent: list[Change] = []
        self._unsent_lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bans", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(self._error):
            self._send()
        self._client.close()
        super().close()

    def version(self) -> int:
        """See State: what others changed comes in by the same connection to the file."""
        return super().version() + (self._carried_out << 32)

    def put_ban(self, ban: Ban, *, replace: bool) -> None:
        super().put_ban(ban, replace=replace)
        self._tell(Change(self._origin, ban.created, ban.key, ban.user, ban, replace))

    def lift(self, subject: Subject, now: float) -> list[Ban]:
        lifted = super().lift(subject, now)
        self._tell(Change(self._origin, now, *subject))
        return lifted

    def _tell(self, change: Change) -> None:
        with self._unsent_lock:
            self._unsent.append(change)
        with contextlib.suppress(self._error):  # the thread tries again
            self._send()

    def _send(self) -> None:
        with self._unsent_lock:
            while self._unsent:
                text = msgspec.json.encode(self._unsent[0])
                self._client.xadd(STREAM, {"c": text}, maxlen=MAX_CHANGES, approximate=True)
                del self._unsent[0]

    # The thread

    def _run(self) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                self._send()
                self._take()
                failing = False
            except (self._error, sqlite3.Error, msgspec.MsgspecError) as error:
                if not failing:
                    log.error("bans are not shared for the moment: %s", error)
                failing = True
            self._stop.wait(LOOK_S)

    def _take(self) -> None:
        """Carry out what others have changed since the last look."""
        entries = self._client.xrange(STREAM, min=f"({_text(self._last)}")
        changes = [msgspec.json.decode(fields[b"c"], type=Change) for _, fields in entries]
        for change in _latest(changes):
            if change.origin != self._origin:
                self._carry_out(change)
        if entries:
            self._last = entries[-1][0]

    def _carry_out(self, change: Change) -> None:
        now, subject = self._time(), Subject(change.key, change.user)
        known = [ban for ban in self.bans(now) if ban.created <= change.time]
        if change.ban is None:
            if any(is_meant(ban.subject, subject) for ban in known):
                super().lift(subject, now)
                self._carried_out += 1
        elif change.ban.holds(now) and change.ban not in known:
            super().put_ban(change.ban, replace=change.replace)
            self._carried_out += 1


def _latest(changes: list[Change]) -> list[Change]:
    """Without bans that a later change has lifted."""
    kept: list[Change] = []
    for change in changes:
        if change.ban is None:
            subject = Subject(change.key, change.user)
            kept = [c for c in kept if c.ban is None or not is_meant(c.ban.subject, subject)]
        kept.append(change)
    return kept


def _text(entry: bytes | str) -> str:
    return entry.decode() if isinstance(entry, bytes) else entry
