"""SIGTERM under a bare torchrun: requests finish before the ranks go.

With our launcher this is not needed, since it drains the front end before it stops torchrun. An
operator's torchrun sends SIGTERM to all ranks when it is to stop, and kills after 30 s. But it also
does so when one of them has died, to start all anew; then the others have lost their group, and the
sooner they go the better.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from nanogpt import process

SETTLE_S = 0.7  # in which a rank notices that another one is gone
LONGEST_S = 28.0  # torchrun kills after 30
MARGIN_S = 4.0  # beyond the drain, for the front end to tell who has not finished, and to leave


class Departure:
    """What a rank's parent does about SIGTERM. `has_group`: whether its child is in a group;
    `front_end`: pid of the front end that this rank has to drain, None when it has none to."""

    def __init__(
        self, has_group: Callable[[], bool], front_end: Callable[[], int | None], drain_s: float
    ) -> None:
        self._has_group, self._front_end = has_group, front_end
        self._patience_s = min(drain_s + MARGIN_S, LONGEST_S)
        self._asked_at: float | None = None
        self._draining: int | None = None  # pidfd of the front end

    def ask(self, number: int, frame: FrameType | None) -> None:
        """For a signal handler."""
        self._asked_at = self._asked_at or time.monotonic()

    @property
    def is_asked(self) -> bool:
        return self._asked_at is not None

    def is_due(self) -> bool:
        """Whether this process is to end now. Call often."""
        if self._asked_at is None or time.monotonic() - self._asked_at < SETTLE_S:
            return False
        if not self._has_group():
            return True
        late = time.monotonic() - self._asked_at > self._patience_s
        if self._draining is None:
            self._draining = self._begin()
            return late  # a rank without a front end goes with its group
        return late or process.has_ended(self._draining)

    def _begin(self) -> int | None:
        pid = self._front_end()
        pidfd = None if pid is None else process.open_pidfd(pid)
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        return pidfd

    def finish(self) -> None:
        """Kill a front end that took too long."""
        if self._draining is not None:
            process.kill(self._draining)
            os.close(self._draining)
