"""Carries out a batch: checks its input, has its lines fed to the engines, writes its files.

One thread owns a batch. A result is kept once, under the batch's lease; after a restart lines that
have one are skipped. So each line has exactly one, whatever was killed in between. Lines for models
that only another cluster has are left out, and the batch goes back for that one to take when the
rest is done.

Once a batch is finalizing, its files follow from what is kept: whoever writes them writes the same,
and only whoever holds the lease.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from nanogpt.api.jobs.batch_feed import BatchFeed, InputGone, Room, output_line
from nanogpt.api.jobs.lines import LineRunner
from nanogpt.api.jobs.objects import LineError
from nanogpt.errors import NotFound
from nanogpt.jobs import batches
from nanogpt.jobs.batches import BatchError, BatchLine, BatchState, Validation
from nanogpt.jobs.files import Files, Upload
from nanogpt.jobs.runner import Lease
from nanogpt.jobs.store import Job, Status

CHECK_LINES = 1000  # validated between two looks

OUTPUT, ERRORS = "output", "error"

INPUT_GONE = BatchError(
    "input_file_gone",
    "the input file was deleted, or expired, before the batch had read all of it; results that "
    "there were by then are in the files of the batch",
    param="input_file_id",
)


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
        run = BatchFeed(lease, state, self._runner, self._room)
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

    def _finish(self, lease: Lease, state: BatchState, run: BatchFeed) -> None:
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

    def _left_over(self, lease: Lease, state: BatchState, run: BatchFeed) -> Iterator[bytes]:
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
                yield output_line(lease.job.id, number, line.custom_id, None, error)


def _status(lease: Lease, state: BatchState, run: BatchFeed) -> Status:
    if run.complete:
        return "completed"
    if lease.cancelled:
        return "cancelled"
    return "failed" if state.errors and not state.expired else "completed"
