"""Each rank's heartbeat: a thread that tells the front end that the process is alive."""

import threading
from collections.abc import Callable

from nanogpt.cluster.messages import Beat, Welcome
from nanogpt.cluster.transport import EventLink
from nanogpt.request import EngineStats


class Heart:
    """Beats for one epoch."""

    def __init__(
        self,
        welcome: Welcome,
        rank: int,
        is_local: bool,
        interval_s: float,
        stats: Callable[[], tuple[EngineStats, ...]],
        sent: Callable[[], int],
    ) -> None:
        """`stats` and `sent` are what a beat tells: see messages.py."""
        self._welcome, self._rank, self._is_local = welcome, rank, is_local
        self._interval_s, self._stats, self._sent = interval_s, stats, sent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        link = EventLink(self._welcome, self._is_local)
        while not self._stop.is_set():
            link.send(Beat(self._welcome.epoch, self._rank, self._stats(), self._sent()))
            self._stop.wait(self._interval_s)
        link.close()
