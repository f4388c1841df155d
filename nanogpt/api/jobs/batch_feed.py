"""Feeds the lines of a batch to the engines, and keeps their results.

The batch's thread reads lines, hands them to threads as there is room, and keeps what these bring
under the batch's lease.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from nanogpt.api.jobs.batches import custom_request_id
from nanogpt.api.jobs.lines import LineAnswer, LineRunner, Stopped, choices, refused
from nanogpt.api.jobs.objects import LineError, LineResponse, OutputLine
from nanogpt.api.protocol import CompletionRequest
from nanogpt.api.response import encode
from nanogpt.errors import ApiError
from nanogpt.jobs import batches
from nanogpt.jobs.batches import BatchLine, BatchState, LineResult
from nanogpt.jobs.runner import Lease, PutBack
from nanogpt.jobs.store import StoreUnavailable

log = logging.getLogger(__name__)

FLUSH_S = 0.2  # how often results are kept
LOOK_S = 1.0  # how often a batch asks whether it was cancelled
MAX_UNKEPT = 10_000  # results that wait for a store that is not there


class InputGone(Exception):
    """The rest of the input file can't be read any more."""


class Room:
    """Choices of batches that may be generated at once, for all batches together."""

    def __init__(self, choices: int) -> None:
        self.total = self._free = choices
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        """How many were taken, 0 when there is no room. A larger request takes all there is."""
        count = min(count, self.total)
        with self._lock:
            if self._free < count:
                return 0
            self._free -= count
            return count

    def give_back(self, count: int) -> None:
        with self._lock:
            self._free += count


class BatchFeed:
    """Lines on their way through the engines."""

    def __init__(self, lease: Lease, state: BatchState, runner: LineRunner, room: Room) -> None:
        self._lease, self._state, self._runner, self._room = lease, state, runner, room
        self._expires = batches.spec_of(lease.job.request).expires
        self.expired = self.input_gone = False
        self.done: set[int] = set()  # numbers of lines that have a result, kept or not
        state.completed = state.failed = 0
        for record in lease.each_record():
            self._count(batches.result(record))
        self._results: queue.SimpleQueue[LineResult | None] = queue.SimpleQueue()
        self._unkept: list[bytes] = []
        self._left_to_others = ""  # a model that lines want and another cluster has
        self._running = 0
        self._stop = threading.Event()
        self._keep_at = self._look_at = 0.0

    @property
    def complete(self) -> bool:
        """Whether every line has a result."""
        return len(self.done) == self._state.total

    def _count(self, found: LineResult) -> None:
        self.done.add(found.line)
        if found.ok:
            self._state.completed += 1
        else:
            self._state.failed += 1

    def feed(self, lines: Iterator[tuple[int, bytes]], clock: Callable[[], float]) -> None:
        """Run all lines, until the batch is cancelled or expires. Raises LeaseLost, PutBack."""
        try:
            self._feed(lines, clock)
        finally:
            self._stop.set()
            while self._running:  # they notice within a second
                self._collect(LOOK_S)
            self._keep()
        while self._unkept:  # the store was not there
            self._lease.check()
            time.sleep(LOOK_S)
            self._keep()

    def _feed(self, lines: Iterator[tuple[int, bytes]], clock: Callable[[], float]) -> None:
        with ThreadPoolExecutor(self._room.total, "batch-line") as pool:
            try:
                if not self._start_all(pool, lines, clock):
                    return
                while self._running and not self._must_stop(clock):
                    self._turn(FLUSH_S)
                leaves_some = self._left_to_others and not self.input_gone
                if leaves_some and not self._must_stop(clock):
                    name = self._left_to_others
                    raise PutBack(f"the model {name!r} is served by another cluster")
            finally:
                self._stop.set()  # before the pool waits for its threads

    def _start_all(
        self,
        pool: ThreadPoolExecutor,
        lines: Iterator[tuple[int, bytes]],
        clock: Callable[[], float],
    ) -> bool:
        """Those without a result, as far as they can be read. False when the batch must stop."""
        if self.complete:
            return True
        try:
            for number, text in lines:
                if number not in self.done and not self._start(pool, number, text, clock):
                    return False
        except InputGone:
            self.input_gone = True
        return True

    def _start(
        self, pool: ThreadPoolExecutor, number: int, text: bytes, clock: Callable[[], float]
    ) -> bool:
        """Hand a line to a thread as soon as there is room. False when the batch must stop."""
        line = batches.read_line(text)
        assert isinstance(line, BatchLine), "it was validated"
        try:
            request = self._runner.parse(bytes(line.body))
        except ApiError as error:
            self._take(_answered(self._lease.job.id, number, line, refused(error)))
            self._turn(0.0)
            return not self._must_stop(clock)
        if self._runner.is_elsewhere(request):
            self._left_to_others = request.model
            return not self._must_stop(clock)
        while True:
            if self._must_stop(clock):
                return False
            if len(self._unkept) < MAX_UNKEPT and (taken := self._room.take(choices(request))):
                break
            self._turn(0.05)
        self._running += 1
        pool.submit(self._work, number, line, request, taken)
        self._turn(0.0)
        return True

    def _must_stop(self, clock: Callable[[], float]) -> bool:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._lease.check()
            self.expired = clock() >= self._expires
        return self.expired or self._lease.cancelled

    # The batch's thread keeps results

    def _turn(self, timeout: float) -> None:
        self._collect(timeout)
        if self._unkept and time.monotonic() >= self._keep_at:
            self._keep()

    def _collect(self, timeout: float) -> None:
        try:
            found = self._results.get(timeout=timeout) if timeout else self._results.get_nowait()
            while True:
                self._running -= 1
                if found is not None:
                    self._take(found)
                found = self._results.get_nowait()
        except queue.Empty:
            return

    def _take(self, found: LineResult) -> None:
        self._count(found)
        self._unkept.append(batches.encode(found))

    def _keep(self) -> None:
        """Raises LeaseLost. What the store can't take now stays for the next time."""
        self._keep_at = time.monotonic() + FLUSH_S
        try:
            self._lease.append(self._unkept, batches.encode(self._state))
            self._unkept = []
        except StoreUnavailable as error:
            log.error("results of %s wait: %s", self._lease.job.id, error)
            self._keep_at += LOOK_S

    # A line's thread

    def _work(self, number: int, line: BatchLine, request: CompletionRequest, taken: int) -> None:
        found: LineResult | None = None
        try:
            answer = self._runner.run(
                request,
                owner=self._lease.job.owner,
                request_id=custom_request_id(self._lease.job.id, number),
                seed=batches.seed_of(self._lease.job.id, number),
                stopped=self._stop.is_set,
            )
            found = _answered(self._lease.job.id, number, line, answer)
        except Stopped:
            pass  # it has no result, and is run again or reported as not run
        finally:
            self._room.give_back(taken)
            self._results.put(found)


def _answered(batch_id: str, number: int, line: BatchLine, answer: LineAnswer) -> LineResult:
    response = LineResponse(
        answer.status, custom_request_id(batch_id, number), msgspec.Raw(answer.body)
    )
    text = output_line(batch_id, number, line.custom_id, response, None)
    return LineResult(number, answer.status == 200, text)


def output_line(
    batch_id: str,
    number: int,
    custom_id: str,
    response: LineResponse | None,
    error: LineError | None,
) -> bytes:
    line = OutputLine(custom_request_id(batch_id, number), custom_id, response, error)
    return encode(line)
