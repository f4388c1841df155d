"""Who is admitted next."""

from bisect import insort
from collections.abc import Iterator

from nanogpt.engine.sequence import Sequence


class WaitingQueue:
    """First come, first served within a priority. A preempted sequence gets its old place back."""

    def __init__(self) -> None:
        self._queue: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def push(self, seq: Sequence) -> None:
        insort(self._queue, seq, key=lambda s: s.key)

    def peek(self) -> Sequence:
        return self._queue[0]

    def pop(self) -> Sequence:
        return self._queue.pop(0)

    def remove(self, seq: Sequence) -> None:
        self._queue.remove(seq)
