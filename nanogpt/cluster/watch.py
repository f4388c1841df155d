"""Notices ranks that hang, and kills them so that torchrun starts the group anew.

A rank that dies is torchrun's to notice. One that is stopped, or whose step never ends, looks
alive to torchrun; but its beats stop, or say that its loop no longer turns.
"""

import logging
import os
from collections.abc import Callable

from nanogpt import process

log = logging.getLogger(__name__)


class Watch:
    """Beats of the ranks of one epoch. Times are monotonic seconds, given by the caller."""

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
        self._pidfds: dict[int, int | None] = {}  # None: a process of another node
        self._heard: dict[int, float] = {}
        self._idle: dict[int, float] = {}
        self._given_up = False

    def begin(self) -> None:
        """A new epoch: forget the ranks of the old one."""
        for pidfd in self._pidfds.values():
            if pidfd is not None:
                os.close(pidfd)
        self._pidfds, self._heard, self._idle = {}, {}, {}
        self._given_up = False

    def join(self, rank: int, node: int, pid: int, now: float) -> None:
        if rank in self._pidfds:
            return
        self._pidfds[rank] = self._open_pid(pid) if node == self._node else None
        self._heard[rank] = now

    def beat(self, rank: int, idle_s: float, now: float) -> None:
        self._heard[rank] = now
        self._idle[rank] = idle_s

    def check(self, now: float) -> list[int]:
        """Kill what hangs, once an epoch. Returns the ranks that were found hanging.

        A rank on another node can't be killed from here: rank 0 is killed in its place, which
        ends the group on every node all the same.
        """
        if self._given_up:
            return []
        hanging = [
            rank
            for rank, heard in self._heard.items()
            if now - heard > self._watchdog_s or self._idle.get(rank, 0.0) > self._stuck_s
        ]
        if not hanging:
            return []
        self._given_up = True
        if any(p is not None and self._has_ended(p) for p in self._pidfds.values()):
            return []  # a rank died: torchrun has noticed, and is ending the others
        for rank in hanging:
            log.error(
                "rank %d hangs (silent for %.1f s, last turn %.1f s before): killed",
                rank,
                now - self._heard[rank],
                self._idle.get(rank, 0.0),
            )
            target = self._pidfds[rank]
            if target is None:
                target = self._pidfds[0]
            if target is not None:
                self._kill(target)
        return hanging
