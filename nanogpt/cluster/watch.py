"""Notices ranks that die or fall silent, and kills the silent so that others take their places.

A rank that dies shows in its pidfd. One that hangs is mostly found by its parent (respawn.py); this
is for those that no parent can help: on a machine that froze, or that the network cut off.
"""

import logging
import os
from collections.abc import Callable

from nanogpt import process

log = logging.getLogger(__name__)

# The front end looks twice a second: after a longer pause it itself was stopped or starved.
OWN_PAUSE_S = 1.5


class Watch:
    """The ranks of one epoch. Times are monotonic seconds, given by the caller."""

    def __init__(
        self,
        *,
        watchdog_s: float,
        open_pid: Callable[[int], int | None] = process.open_pidfd,
        has_ended: Callable[[int], bool] = process.has_ended,
        kill: Callable[[int], None] = process.kill,
    ) -> None:
        self._watchdog_s = watchdog_s
        self._open_pid, self._has_ended, self._kill = open_pid, has_ended, kill
        self._pidfds: dict[int, int | None] = {}  # None: a process of another node, or gone
        self._heard: dict[int, float] = {}
        self._killed: set[int] = set()
        self._checked: float | None = None

    @property
    def pidfds(self) -> list[int]:
        """Those of the ranks on this node: readable once a process has ended."""
        return [pidfd for pidfd in self._pidfds.values() if pidfd is not None]

    def begin(self) -> None:
        """A new epoch: forget the ranks of the old one. Closes their pidfds."""
        for pidfd in self.pidfds:
            os.close(pidfd)
        self._pidfds, self._heard, self._killed = {}, {}, set()

    def join(self, rank: int, node: int, pid: int, now: float) -> int | None:
        """Watch a rank from here on. Returns its pidfd, if it has one and is new."""
        if rank in self._pidfds:
            return None
        self._pidfds[rank] = self._open_pid(pid) if node == 0 else None
        self._heard[rank] = now
        return self._pidfds[rank]

    def beat(self, rank: int, now: float) -> None:
        self._heard[rank] = now

    def check(self, now: float) -> list[int]:
        """Kill who is silent, each rank once an epoch; returns their ranks. Call often: time in
        which it isn't called is time in which beats were not read, and doesn't count.

        A rank on another node can't be killed from here: rank 0 is killed in its place, which
        ends the group on every node all the same.
        """
        if self._checked is not None and now - self._checked > OWN_PAUSE_S:
            self._heard = {r: t + now - self._checked for r, t in self._heard.items()}
        self._checked = now
        silent = [rank for rank in self._heard if self._is_silent(rank, now)]
        for rank in silent:
            log.error("rank %d is silent for %.1f s: killed", rank, now - self._heard[rank])
            self._killed.add(rank)
            target = self._pidfds[rank]
            if target is None:
                target = self._pidfds.get(0)
            if target is not None:
                self._kill(target)
        return silent

    def _is_silent(self, rank: int, now: float) -> bool:
        if rank in self._killed or now - self._heard[rank] <= self._watchdog_s:
            return False
        pidfd = self._pidfds[rank]
        return pidfd is None or not self._has_ended(pidfd)  # who is dead is silent, too
