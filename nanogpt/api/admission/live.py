"""Keys and bans in memory, never more than a moment behind the state file."""

import logging
import sqlite3
import threading
from collections.abc import Callable

from nanogpt.api.admission.bans import BanList
from nanogpt.api.admission.clock import Clock
from nanogpt.api.admission.keys import Key, KeyRing
from nanogpt.api.admission.state import State
from nanogpt.errors import StartupError

log = logging.getLogger("admission")

REFRESH_S = 0.5  # how old the copy may be: asking the file takes microseconds


class Live:
    """Thread-safe; whichever request comes when it is time looks for changes.

    When the file can't be read the last copy stays in force.
    """

    def __init__(
        self, state: State, make_ring: Callable[[list[Key]], KeyRing], clock: Clock
    ) -> None:
        self._state, self._make_ring, self._clock = state, make_ring, clock
        self._lock = threading.Lock()
        self._failing = False
        self._load()

    @property
    def ring(self) -> KeyRing:
        self._refresh()
        return self._ring

    @property
    def bans(self) -> BanList:
        self._refresh()
        return self._bans

    def reload(self) -> None:
        """After a change by this process. Raises sqlite3.Error, StartupError."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        self._version = self._state.version()  # first: a change from now on is seen next time
        self._check_at = self._clock.monotonic() + REFRESH_S
        self._bans = BanList(self._state.bans(self._clock.time()))
        self._ring = self._make_ring(self._state.api_keys())  # last: a bad key keeps no ban off

    def _refresh(self) -> None:
        if self._clock.monotonic() < self._check_at or not self._lock.acquire(blocking=False):
            return
        try:
            self._check_at = self._clock.monotonic() + REFRESH_S
            if self._state.version() != self._version:
                self._load()
            self._failing = False
        except (sqlite3.Error, StartupError) as error:
            if not self._failing:
                log.error(
                    "can't read %s (%s): keys and bans stay as they are", self._state.path, error
                )
            self._failing = True
        finally:
            self._lock.release()
