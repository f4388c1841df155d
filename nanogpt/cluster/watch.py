"""Notices ranks that die or hang, and kills those that hang so that others take their places.

A rank that dies shows in its pidfd. One that is stopped, or whose step never ends, looks alive to
its parent; but its beats stop, or say that its loop no longer turns.
"""

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from nanogpt import process

log = logging.getLogger(__name__)

# The front end looks twice a second: after a longer pause it itself was stopped or starved.
OWN_PAUSE_S = 1.5


class Hang(NamedTuple):
    rank: int
    stuck: bool  # it beats, but its loop does not turn


class Watch:
    """The ranks of one epoch. Times are monotonic seconds, given by the caller."""

    def __init__(
        self,
        *,
        watchdog_s: float,
        stuck_s: float,
        node: int = 0,
        open_pid: Callable[[int], int | None] = process.open_pidfd,
        has_ended: Callable[[int], bool] = process.has_ended,
        kill: Callable[[int], None] = process.kill,
    ) -> None:
        self._watchdog_s, self._stuck_s, self._node = watchdog_s, stuck_s, node
        self._open_pid, self._has_ended, self._kill = open_pid, has_ended, kill
        self._pidfds: dict[int, int | None] = {}  # None: a process of another node, or gone
        self._heard: dict[int, float] = {}
        self._idle: dict[int, float] = {}
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
        self._pidfds, self._heard, self._idle, self._killed = {}, {}, {}, set()

    def join(self, rank: int, node: int, pid: int, now: float) -> int | None:
        """Watch a rank from here on. Returns its pidfd, if it has one and is new."""
        if rank in self._pidfds:
            return None
        self._pidfds[rank] = self._open_pid(pid) if node == self._node else None
        self._heard[rank] = now
        return self._pidfds[rank]

    def beat(self, rank: int, idle_s: float, now: float) -> None:
        self._heard[rank] = now
        self._idle[rank] = idle_s

    def check(self, now: float) -> list[Hang]:
        """Kill what hangs, each rank once an epoch; returns what was found. Call often: time in
        which it isn't called is time in which beats were not read, and doesn't count.

        A rank on another node can't be killed from here: rank 0 is killed in its place, which
        ends the group on every node all the same.
        """
        if self._checked is not None and now - self._checked > OWN_PAUSE_S:
            self._heard = {r: t + now - self._checked for r, t in self._heard.items()}
        self._checked = now
        hanging = [Hang(r, stuck=self._is_stuck(r)) for r in self._heard if self._hangs(r, now)]
        for rank, stuck in hanging:
            log.error(
                "rank %d hangs (%s): killed",
                rank,
                f"no turn for {self._idle[rank]:.1f} s"
                if stuck
                else f"silent for {now - self._heard[rank]:.1f} s",
            )
            self._killed.add(rank)
            target = self._pidfds[rank]
            if target is None:
                target = self._pidfds.get(0)
            if target is not None:
                self._kill(target)
        return hanging

    def _hangs(self, rank: int, now: float) -> bool:
        if rank in self._killed:
            return False
        if now - self._heard[rank] <= self._watchdog_s and not self._is_stuck(rank):
            return False
        pidfd = self._pidfds[rank]
        return pidfd is None or not self._has_ended(pidfd)  # who is dead is silent, too

    def _is_stuck(self, rank: int) -> bool:
        return self._idle.get(rank, 0.0) > self._stuck_s
