"""Feeds the lines of a batch to the engines, and keeps their results.

All of it is done by the batch's thread: it reads lines, begins with them as there is room, looks
after those that run, and keeps their results under the batch's lease. A thread for each line would
take the interpreter from those that serve clients, and the cores from the engines.
"""

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from nanogpt.api.jobs.batches import custom_request_id
from nanogpt.api.jobs.lines import Line, LineAnswer, LineRunner, choices, refused
from nanogpt.api.jobs.objects import LineError, LineResponse, OutputLine
from nanogpt.api.response import encode
from nanogpt.errors import ApiError, Unavailable
from nanogpt.jobs import batches
from nanogpt.jobs.batches import BatchLine, BatchState, LineResult
from nanogpt.jobs.runner import Lease, PutBack
from nanogpt.jobs.store import StoreUnavailable

log = logging.getLogger(__name__)

FLUSH_S = 0.2  # how often results are kept
LOOK_S = 1.0  # how often a batch asks whether it was cancelled
TURN_S = 0.25  # how often lines are looked at that say nothing
# How long lines leave a model alone that is unavailable: longer each time.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
FULL_S = 0.05  # between two looks for room, which other batches may give back
MAX_UNKEPT = 10_000  # results that wait for a store that is not there


class InputGone(Exception):
    """The rest of the input file can't be read any more."""


class Room:
    """Choices of batches that may be generated at once, for all batches together."""

    def __init__(self, total: Callable[[], int]) -> None:
        self._total, self._taken = total, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        """How many were taken, 0 when there is no room. A larger request takes all there is."""
        total = self._total()
        count = min(count, total)
        with self._lock:
            if self._taken + count > total:
                return 0
            self._taken += count
            return count

    def give_back(self, count: int) -> None:
        with self._lock:
            self._taken -= count


class _Running(NamedTuple):
    custom_id: str
    line: Line
    taken: int  # of the room


class Gate:
    """Before one model, which may be unavailable for a while. Whenever it has been shut for long
    enough, one line is let through, and the others when that one has got a token."""

    def __init__(self) -> None:
        self._until = 0.0  # time.monotonic()
        self._pause = 0.0  # 0: it is open
        self._probe: int | None = None  # number of the line that was let through

    def lets(self, number: int) -> bool:
        """Whether a line may begin now; if so, it does."""
        if not self._pause:
            return True
        if self._probe is not None or time.monotonic() < self._until:
            return False
        self._probe = number
        return True

    def shut(self) -> None:
        """The model is unavailable."""
        now = time.monotonic()
        if now >= self._until:  # what was under way before fails as well, for the same reason
            self._pause = min(LONGEST_PAUSE_S, 2 * self._pause) or FIRST_PAUSE_S
            self._until = now + self._pause
        self._probe = None

    def open(self) -> None:
        self._until = self._pause = 0.0
        self._probe = None

    def forget(self, number: int) -> None:
        """This line is over, whatever came of it."""
        if self._probe == number:
            self._probe = None


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
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()  # numbers of lines that have some
        self._running: dict[int, _Running] = {}  # by the line's number
        self._waiting: set[int] = set()  # of these, which the engines don't have
        self._gates: defaultdict[str, Gate] = defaultdict(Gate)  # by model
        self._unkept: list[bytes] = []
        self._left_to_others = ""  # a model that lines want and another cluster has
        self._keep_at = self._look_at = self._turn_at = 0.0  # time.monotonic()

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
            self._give_up()
            self._keep()
        while self._unkept:  # the store was not there
            self._lease.check()
            time.sleep(LOOK_S)
            self._keep()

    def _feed(self, lines: Iterator[tuple[int, bytes]], clock: Callable[[], float]) -> None:
        if not self._start_all(lines, clock):
            return
        while self._running and not self._must_stop(clock):
            self._turn(FLUSH_S)
        leaves_some = self._left_to_others and not self.input_gone
        if leaves_some and not self._must_stop(clock):
            raise PutBack(f"the model {self._left_to_others!r} is served by another cluster")

    def _start_all(self, lines: Iterator[tuple[int, bytes]], clock: Callable[[], float]) -> bool:
        """Those without a result, as far as they can be read. False when the batch must stop."""
        if self.complete:
            return True
        try:
            for number, text in lines:
                if number not in self.done and not self._start(number, text, clock):
                    return False
        except InputGone:
            self.input_gone = True
        return True

    def _start(self, number: int, text: bytes, clock: Callable[[], float]) -> bool:
        """Begin with a line as soon as there is room. False when the batch must stop."""
        line = batches.read_line(text)
        assert isinstance(line, BatchLine), "it was validated"
        try:
            request = self._runner.parse(bytes(line.body))
        except ApiError as error:
            self._take(_answered(self._lease.job.id, number, line.custom_id, refused(error)))
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
            self._turn(FULL_S)
        started = self._runner.line(
            request,
            owner=self._lease.job.owner,
            request_id=custom_request_id(self._lease.job.id, number),
            seed=batches.seed_of(self._lease.job.id, number),
            on_news=lambda: self._news.put(number),
        )
        self._running[number] = _Running(line.custom_id, started, taken)
        self._begin(number)
        self._turn(0.0)
        return True

    def _must_stop(self, clock: Callable[[], float]) -> bool:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._lease.check()
            self._turn_away()
            self.expired = clock() >= self._expires
        return self.expired or self._lease.cancelled

    def _turn_away(self) -> None:
        """Lines of users who have been banned meanwhile."""
        job = self._lease.job
        banned: dict[str | None, LineAnswer] = {}
        for user in {its.line.request.user for its in self._running.values()}:
            try:
                self._runner.check_still_allowed(job.owner, user, job.id)
            except ApiError as error:
                banned[user] = refused(error)
        for number, its in [*self._running.items()] if banned else ():
            if its.line.request.user in banned:
                its.line.close()
                self._end(number, banned[its.line.request.user])

    def _turn(self, timeout: float) -> None:
        """Advance lines that have news, after waiting so many seconds for some, and all of them
        every now and then. Raises LeaseLost."""
        try:
            self._advance(self._news.get(timeout=timeout) if timeout else self._news.get_nowait())
            while True:
                self._advance(self._news.get_nowait())
        except queue.Empty:
            pass
        now = time.monotonic()
        if now >= self._turn_at:
            for number in [*self._running]:
                self._advance(number)
            for number in sorted(self._waiting):
                self._begin(number)
            self._turn_at = time.monotonic() + TURN_S
        if self._unkept and now >= self._keep_at:
            self._keep()

    def _begin(self, number: int) -> None:
        line = self._running[number].line
        gate = self._gates[line.request.model]
        self._waiting.add(number)
        if not gate.lets(number):
            return
        try:
            answer = line.begin()
        except Unavailable as error:  # the cluster is full, or being loaded
            log.debug("lines of a batch wait: %s", error)
            gate.shut()
            return
        self._waiting.discard(number)
        if answer is not None:
            self._end(number, answer)

    def _advance(self, number: int) -> None:
        its = self._running.get(number)
        if its is None or not its.line.is_begun:
            return
        try:
            answer = its.line.advance()
        except Unavailable as error:  # there is no room for the model, or it was replaced
            log.debug("lines of a batch wait: %s", error)
            self._gates[its.line.request.model].shut()
            self._waiting.add(number)
            return
        if its.line.has_tokens:
            self._gates[its.line.request.model].open()
        if answer is not None:
            self._end(number, answer)

    def _end(self, number: int, answer: LineAnswer) -> None:
        its = self._running.pop(number)
        self._waiting.discard(number)
        self._gates[its.line.request.model].forget(number)
        self._room.give_back(its.taken)
        self._take(_answered(self._lease.job.id, number, its.custom_id, answer))

    def _give_up(self) -> None:
        """What still runs has no result, and is run again or reported as not run."""
        for number in [*self._running]:
            self._advance(number)  # it may just have ended
        while self._running:
            _, its = self._running.popitem()
            self._room.give_back(its.taken)
            its.line.close()

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


def _answered(batch_id: str, number: int, custom_id: str, answer: LineAnswer) -> LineResult:
    response = LineResponse(
        answer.status, custom_request_id(batch_id, number), msgspec.Raw(answer.body)
    )
    text = output_line(batch_id, number, custom_id, response, None)
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
