"""Who is admitted next."""

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from operator import attrgetter

from nanogpt.engine.fairness import Flow
from nanogpt.engine.sequence import Sequence

_arrival = attrgetter("arrival")


def admission_key(seq: Sequence) -> tuple[int, float, int]:
    """Lower priority, then whose flow has received less, then who came first."""
    return seq.priority, seq.flow.service, seq.arrival


_Entry = tuple[tuple[int, float, int], int, Flow]  # the first one's key; a serial number


class WaitingQueue:
    """In order of admission_key; a preempted sequence gets its old place in its flow back.

    The heap orders flows. What it knows of one may be out of date, but only too small: service
    grows, and a new first sequence enters its flow again. So an entry is checked when it comes
    up, and an operation costs O(log flows).
    """

    def __init__(self) -> None:
        self._queues: dict[Flow, list[Sequence]] = {}  # none is empty
        self._heap: list[_Entry] = []
        self._serial = count()  # equal entries don't compare flows

    def __bool__(self) -> bool:
        return bool(self._queues)

    def push(self, seq: Sequence) -> None:
        queue = self._queues.setdefault(seq.flow, [])
        insort(queue, seq, key=_arrival)
        if queue[0] is seq:
            heappush(self._heap, self._entry(seq.flow))
            if len(self._heap) > 2 * len(self._queues) + 16:
                self._heap = [self._entry(flow) for flow in self._queues]
                heapify(self._heap)

    def peek(self) -> Sequence:
        while True:
            entry = self._heap[0]
            flow = entry[-1]
            if flow not in self._queues:
                heappop(self._heap)
            elif entry[0] == admission_key(self._queues[flow][0]):
                return self._queues[flow][0]
            else:
                heapreplace(self._heap, self._entry(flow))

    def pop(self) -> Sequence:
        seq = self.peek()
        self.remove(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        queue = self._queues[seq.flow]
        del queue[bisect_left(queue, seq.arrival, key=_arrival)]
        if not queue:
            del self._queues[seq.flow]

    def _entry(self, flow: Flow) -> _Entry:
        return admission_key(self._queues[flow][0]), next(self._serial), flow
