"""Waits for messages of one lane, in a thread of its own, while somebody wants them."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from nanogpt.jobs.sqs_link import Message
from nanogpt.jobs.store import StoreUnavailable

log = logging.getLogger(__name__)

WANTED_S = 1.0  # after the last `take` nobody wants any
OFFERED_S = 1.0  # what is not taken by then goes back, for others
RETRY_S = 1.0


class Receiver:
    """`receive` waits for messages, `give_back` shows them to others again. `news`: told whenever
    there is something to take, and held while `take` is called."""

    def __init__(
        self,
        name: str,
        news: threading.Condition,
        receive: Callable[[], list[Message]],
        give_back: Callable[[Sequence[Message]], None],
    ) -> None:
        self._news, self._receive, self._give_back = news, receive, give_back
        self._offered: deque[Message] = deque()
        self._problem: StoreUnavailable | None = None
        self._wanted_until = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"sqs-{name}", daemon=True)

    def take(self) -> Message | None:
        """One that has come, or None; more are asked for. Raises StoreUnavailable, once, when that
        failed."""
        self._wanted_until = time.monotonic() + WANTED_S
        if not self._thread.is_alive() and not self._closed:
            self._thread.start()
        self._news.notify_all()
        if self._offered:
            return self._offered.popleft()
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        return None

    def stop(self) -> None:
        """Receive no more. `join` waits for the end."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while self._wait_until_wanted():
            try:
                messages = self._receive()
            except StoreUnavailable as error:
                self._tell(error)
                continue
            except Exception as error:  # this thread is the only one that receives
                log.exception("receiving messages failed")
                self._tell(StoreUnavailable(f"receiving messages failed: {error}"))
                continue
            with self._news:
                self._offered.extend(messages)
                self._news.notify_all()
                self._news.wait_for(lambda: self._closed or not self._offered, OFFERED_S)
                left = list(self._offered)
                self._offered.clear()
            if left:
                self._return(left)

    def _wait_until_wanted(self) -> bool:
        """False: it is closed."""
        with self._news:
            self._news.wait_for(lambda: self._closed or time.monotonic() < self._wanted_until)
            return not self._closed

    def _tell(self, error: StoreUnavailable) -> None:
        with self._news:
            self._problem = error
            self._news.notify_all()
            self._news.wait_for(lambda: self._closed, RETRY_S)

    def _return(self, messages: Sequence[Message]) -> None:
        try:
            self._give_back(messages)
        except StoreUnavailable as error:
            log.info("%d messages stay hidden for a while: %s", len(messages), error)
