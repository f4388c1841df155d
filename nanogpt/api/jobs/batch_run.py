"""Carries out a batch: checks its input, feeds its lines to the engines, writes its files.

One thread owns a batch: it reads lines, hands them to threads as there is room, and keeps their
results. A result is kept once, under the batch's lease; after a restart lines that have one are
skipped. So each line has exactly one, whatever was killed in between. Lines for models that only
another cluster has are left out, and the batch goes back for that one to take when the rest is
done.

Once a batch is finalizing, its files follow from what is kept: whoever writes them writes the same,
and only whoever holds the lease.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgspec

from nanogpt.api.jobs.batches import custom_request_id
from nanogpt.api.jobs.lines import LineAnswer, LineRunner, Stopped, choices, refused
from nanogpt.api.jobs.objects import LineError, LineResponse, OutputLine
from nanogpt.api.protocol import CompletionRequest
from nanogpt.api.response import encode
from nanogpt.errors import ApiError, NotFound
from nanogpt.jobs import batches
from nanogpt.jobs.batches import BatchError, BatchLine, BatchState, LineResult, Validation
from nanogpt.jobs.files import Files, Upload
from nanogpt.jobs.runner import Lease, PutBack
from nanogpt.jobs.store import Job, Status, StoreUnavailable

log = logging.getLogger(__name__)

FLUSH_S = 0.2  # how often results are kept
LOOK_S = 1.0  # how often a batch asks whether it was cancelled
CHECK_LINES = 1000  # validated between two looks
MAX_UNKEPT = 10_000  # results that wait for a store that is not there

OUTPUT, ERRORS = "output", "error"

INPUT_GONE = BatchError(
    "input_file_gone",
    "the input file was deleted, or expired, before the batch had read all of it; results that "
    "there were by then are in the files of the batch",
    param="input_file_id",
)


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


class BatchExecutor:
    """See nanogpt.jobs.runner.Executor."""

    def __init__(
        self,
        runner: LineRunner,
        files: Files,
        room: Room,
        *,
        max_line_bytes: int,
        keep_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._runner, self._files, self._room = runner, files, room
        self._max_line_bytes, self._keep_s, self._clock = max_line_bytes, keep_s, clock

    def __call__(self, lease: Lease) -> None:
        state = batches.state_of(lease.job.state)
        if state.phase == "validating" and not self._validate(lease, state):
            return
        run = _Run(lease, state, self._runner, self._room)
        if state.phase == "in_progress":
            run.feed(self._lines(lease.job), self._clock)
            state.phase, state.finalizing = "finalizing", self._clock()
            state.expired = run.expired
            state.errors = [INPUT_GONE] if run.input_gone and not run.complete else []
            lease.append([], batches.encode(state))
        self._finish(lease, state, run)

    # Validating

    def _validate(self, lease: Lease, state: BatchState) -> bool:
        validation = Validation(self._max_line_bytes)
        try:
            for number, text in self._lines(lease.job):
                if number % CHECK_LINES == 0:
                    lease.check()
                validation.add(number, text)
                if validation.full:
                    break
            errors = validation.finish()
        except InputGone:
            errors = [INPUT_GONE]
        if errors:
            state.errors = errors
            lease.complete("failed", b"", state=batches.encode(state))
            return False
        state.phase, state.total = "in_progress", validation.total
        state.in_progress = self._clock()
        lease.append([], batches.encode(state))
        return True

    def _lines(self, job: Job) -> Iterator[tuple[int, bytes]]:
        """Raises InputGone."""
        try:
            with self._files.open(batches.spec_of(job.request).input_file_id) as file:
                yield from batches.numbered_lines(file, self._max_line_bytes)
        except NotFound:
            raise InputGone from None

    # The end

    def _finish(self, lease: Lease, state: BatchState, run: "_Run") -> None:
        with ExitStack() as stack:
            uploads = {kind: self._files.upload(of_client=False) for kind in (OUTPUT, ERRORS)}
            for upload in uploads.values():
                stack.callback(upload.close)
            for record in lease.each_record():
                found = batches.result(record)
                uploads[OUTPUT if found.ok else ERRORS].write(found.text + b"\n")
            try:
                for text in self._left_over(lease, state, run):
                    state.failed += 1
                    uploads[ERRORS].write(text + b"\n")
            except InputGone:
                state.errors = [INPUT_GONE]
            for kind, upload in uploads.items():
                if upload.bytes:
                    setattr(state, f"{kind}_file_id", self._add(lease, kind, upload))
        status = _status(lease, state, run)
        lease.complete(status, b"", state=batches.encode(state), forget_records=True)

    def _add(self, lease: Lease, kind: str, upload: Upload) -> str:
        file_id = batches.output_id(lease.job.id, kind)
        self._files.add(
            upload,
            owner=lease.job.owner,
            filename=f"{lease.job.id}_{kind}.jsonl",
            purpose="batch_output",
            keep_s=self._keep_s,
            file_id=file_id,
            lease=lease,
        )
        return file_id

    def _left_over(self, lease: Lease, state: BatchState, run: "_Run") -> Iterator[bytes]:
        """Lines that were not run, because the batch was cancelled or its time was up. Raises
        InputGone."""
        if run.complete or state.errors:
            return
        code = "batch_expired" if state.expired else "batch_cancelled"
        why = "its time was up" if state.expired else "the batch was cancelled"
        error = LineError(code, f"this request was not run: {why}")
        for number, text in self._lines(lease.job):
            if number not in run.done:
                line = batches.read_line(text)
                assert isinstance(line, BatchLine), "it was validated"
                yield _output(lease.job.id, number, line.custom_id, None, error)


def _status(lease: Lease, state: BatchState, run: "_Run") -> Status:
    if run.complete:
        return "completed"
    if lease.cancelled:
        return "cancelled"
    return "failed" if state.errors and not state.expired else "completed"


class _Run:
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
    text = _output(batch_id, number, line.custom_id, response, None)
    return LineResult(number, answer.status == 200, text)


def _output(
    batch_id: str,
    number: int,
    custom_id: str,
    response: LineResponse | None,
    error: LineError | None,
) -> bytes:
    line = OutputLine(custom_request_id(batch_id, number), custom_id, response, error)
    return encode(line)
