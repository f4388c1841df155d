"""A reload, as the front end sees it: what runs finishes, what is new waits for the new ranks.

The launcher asks for it with a mark in the run directory, and restarts the ranks once the front end
has answered with another one. When the first mark is gone and a group is ready, all goes on.
"""

import threading
from collections.abc import Callable

LOOK_EVERY_S = 0.25


class Hold:
    """`patience_s`: how long what runs may take; then it goes on with the new ranks. The I/O thread
    calls `turn`, the others `wait` and `is_open`."""

    def __init__(
        self,
        is_asked: Callable[[], bool] = lambda: False,
        on_held: Callable[[], None] = lambda: None,
        patience_s: float = 0.0,
    ) -> None:
        self._is_asked, self._on_held, self._patience_s = is_asked, on_held, patience_s
        self._open = threading.Event()
        self._open.set()
        self._look_at = self._until = 0.0
        self._told = self._over = False

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether requests are taken, at once or within this time."""
        return self._open.wait(timeout_s)

    def end(self) -> None:
        """The server ends: nobody waits here any more."""
        self._over = True
        self._open.set()

    def turn(self, now: float, is_idle: Callable[[], bool], is_ready: bool) -> None:
        """Look whether something has changed. `is_idle`: nothing runs; `is_ready`: a group is."""
        if now < self._look_at or self._over:
            return
        self._look_at = now + LOOK_EVERY_S
        asked = self._is_asked()
        if asked and self.is_open:
            self._open.clear()
            if self._over:
                self._open.set()  # `end` came between
            self._until, self._told = now + self._patience_s, False
        if asked and not self._told and (is_idle() or now > self._until):
            self._told = True
            self._on_held()
        if not asked and not self.is_open and is_ready:
            self._open.set()
