"""Notices ranks that die or fall silent, and kills the silent so that others take their places.

A rank that dies shows in its pidfd. One that hangs is mostly found by its parent (respawn.py); this
is for those that no parent can help: on a machine that froze, or that the network cut off. And for
messages that are lost when a connection breaks: ZeroMQ makes a new one without a word, and what was
on its way would be missing for ever.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from nanogpt import process

log = logging.getLogger(__name__)

# The front end looks twice a second: after a longer pause it itself was stopped or starved.
OWN_PAUSE_S = 1.5
# Beats have a connection of their own and may overtake other messages, but not by so much.
LOST_S = 10.0


class _Owed(NamedTuple):
    """A rank said at this time that it had sent so many messages, and fewer had come."""

    sent: int
    since: float


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
        self._lead: int | None = None  # rank 0's, also before it has joined
        self._heard: dict[int, float] = {}
        self._received: Counter[int] = Counter()
        self._owed: dict[int, _Owed] = {}
        self._killed: set[int] = set()
        self._checked: float | None = None

    @property
    def pidfds(self) -> list[int]:
        """Those of the ranks on this node: readable once a process has ended."""
        return [pidfd for pidfd in self._pidfds.values() if pidfd is not None]

    def begin(self, lead_pid: int) -> None:
        """A new epoch: forget the ranks of the old one, and close their pidfds. `lead_pid` is rank
        0's, which runs on this node."""
        for pidfd in [*self.pidfds, *([] if self._lead is None else [self._lead])]:
            os.close(pidfd)
        self._lead = self._open_pid(lead_pid)
        self._pidfds, self._heard, self._killed = {}, {}, set()
        self._received, self._owed = Counter(), {}

    def join(self, rank: int, node: int, pid: int, now: float) -> int | None:
        """Watch a rank from here on. Returns its pidfd, if it has one and is new."""
        if rank in self._pidfds:
            return None
        self._pidfds[rank] = self._open_pid(pid) if node == 0 else None
        self._heard[rank] = now
        return self._pidfds[rank]

    def beat(self, rank: int, sent: int, now: float) -> None:
        """It lives, and has sent so many messages but beats in this epoch. A rank that has not
        joined may beat: its word that it is ready can come later, or be lost."""
        if rank in self._heard:
            self._heard[rank] = now
        if self._received[rank] < sent:
            self._owed.setdefault(rank, _Owed(sent, now))

    def receive(self, rank: int) -> None:
        """Another message but a beat has come from it, in this epoch."""
        self._received[rank] += 1
        owed = self._owed.get(rank)
        if owed is not None and self._received[rank] >= owed.sent:
            del self._owed[rank]

    def check(self, now: float) -> list[int]:
        """Kill who is silent, and whose messages were lost, each rank once an epoch; returns their
        ranks. Call often: time in which it isn't called is time in which nothing was read, and
        doesn't count.

        A rank on another node can't be killed from here: rank 0 is killed in its place, which
        ends the group on every node all the same.
        """
        if self._checked is not None and now - self._checked > OWN_PAUSE_S:
            pause = now - self._checked
            self._heard = {r: t + pause for r, t in self._heard.items()}
            self._owed = {r: _Owed(o.sent, o.since + pause) for r, o in self._owed.items()}
        self._checked = now
        silent = [rank for rank in self._heard if self._is_silent(rank, now)]
        for rank in silent:
            log.error("rank %d is silent for %.1f s: killed", rank, now - self._heard[rank])
            self._end(rank)
        owing = [r for r, o in self._owed.items() if self._is_up(r) and now - o.since > LOST_S]
        for rank in owing:
            log.error("messages of rank %d were lost on their way: killed", rank)
            self._end(rank)
        return silent + owing

    def _is_silent(self, rank: int, now: float) -> bool:
        # Who is dead is silent, too.
        return self._is_up(rank) and now - self._heard[rank] > self._watchdog_s

    def _is_up(self, rank: int) -> bool:
        """As far as can be told from here."""
        if rank in self._killed:
            return False
        pidfd = self._pidfds.get(rank)
        return pidfd is None or not self._has_ended(pidfd)

    def _end(self, rank: int) -> None:
        self._killed.add(rank)
        target = self._pidfds.get(rank)
        if target is None:
            target = self._lead
        if target is not None:
            self._kill(target)
