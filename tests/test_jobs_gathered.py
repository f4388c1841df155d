"""Events that come in few pieces: none is lost or out of order, and an end is not waited for."""

import threading
import time

import pytest

from nanogpt.api.jobs.gathered import Gathered
from nanogpt.request import RequestFailed, TokenEvent

FOREVER_S = 60.0  # never waited for when all is well


class Handle:
    owners = (0, 1)

    def __init__(self) -> None:
        self.cancelled: list[int | None] = []

    def send_to(self, sink) -> None:
        self.send = sink

    def cancel(self, index=None) -> None:
        self.cancelled.append(index)


def token(position: int, finish=None) -> TokenEvent:
    return TokenEvent("r", 0, position, (7,), finish_reason=finish)


def test_tokens_wait_for_each_other_and_lose_nothing():
    handle = Handle()
    gathered = Gathered(handle, 0.2)
    handle.send([token(0)])
    assert gathered.events(FOREVER_S) == [token(0)]  # the first ones at once
    sender = threading.Thread(
        target=lambda: [(handle.send([token(i)]), time.sleep(0.001)) for i in range(1, 20)]
    )
    sender.start()
    got, calls = [], 0
    while len(got) < 19:
        got += gathered.events(FOREVER_S)
        calls += 1
    sender.join()
    assert got == [token(i) for i in range(1, 20)]
    assert calls < 19


@pytest.mark.parametrize("last", [token(1, "length"), RequestFailed("r", "broken")])
def test_an_end_comes_at_once(last):
    handle = Handle()
    gathered = Gathered(handle, FOREVER_S)
    handle.send([token(0)])
    assert gathered.events(FOREVER_S) == [token(0)]
    threading.Timer(0.05, lambda: handle.send([last])).start()
    started = time.monotonic()
    assert gathered.events(FOREVER_S) == [last]
    assert time.monotonic() - started < FOREVER_S / 2


def test_patience_has_an_end_and_the_rest_is_passed_on():
    handle = Handle()
    gathered = Gathered(handle, 0.01)
    assert gathered.events(0.01) == []
    gathered.cancel(1)
    assert (gathered.owners, handle.cancelled) == ((0, 1), [1])
