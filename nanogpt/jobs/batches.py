"""Batches without HTTP: the lines of an input file, what is known of a batch, results of lines."""

import hashlib
from collections.abc import Iterator
from typing import Annotated, BinaryIO, Literal

import msgspec
from msgspec import Meta

MAX_LINES = 50_000
MAX_ERRORS = 100  # listed of an input file
ENDPOINT = "/v1/completions"
WINDOW_S = 24 * 3600.0

Phase = Literal["validating", "in_progress", "finalizing"]


class BatchError(msgspec.Struct, frozen=True):
    """Why an input file was refused. Lines count from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for: the request of the batch's job."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    expires: float  # seconds since the epoch


class BatchState(msgspec.Struct, kw_only=True):
    """How far a batch is: the state of its job. Times are seconds since the epoch."""

    phase: Phase = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress: float | None = None
    finalizing: float | None = None
    expired: bool = False
    errors: list[BatchError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None


class BatchLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of an input file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: msgspec.Raw


class LineResult(msgspec.Struct, frozen=True, array_like=True):
    """A record of the batch's job: the line of the output or error file, without its end."""

    line: int  # from 1
    ok: bool
    text: bytes


_lines = msgspec.json.Decoder(BatchLine)
_results = msgspec.msgpack.Decoder(LineResult)
_states = msgspec.msgpack.Decoder(BatchState)
_specs = msgspec.msgpack.Decoder(BatchSpec)
encode = msgspec.msgpack.Encoder().encode


def result(record: bytes) -> LineResult:
    return _results.decode(record)


def state_of(state: bytes) -> BatchState:
    """Of a job, whose state is empty at first."""
    return _states.decode(state) if state else BatchState()


def spec_of(request: bytes) -> BatchSpec:
    return _specs.decode(request)


def numbered_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; a longer one is cut at `max_bytes` + 1."""
    number, skipping = 0, False
    while chunk := file.readline(max_bytes + 1):
        ends = chunk.endswith(b"\n")
        if not skipping:
            number += 1
            if chunk.strip():
                yield number, chunk
        skipping = not ends


def read_line(text: bytes) -> BatchLine | BatchError:
    """One line of the input, or what is wrong with it."""
    try:
        line = _lines.decode(text)
    except msgspec.ValidationError as error:
        message = str(error).replace("`", "")
        return BatchError("invalid_request", f"not a line of a batch: {message[:200]}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BatchError("invalid_json_line", f"not valid JSON in UTF-8: {str(error)[:200]}")
    if line.method != "POST":
        return BatchError(
            "invalid_method", f"method must be POST, got {line.method[:20]!r}", param="method"
        )
    if line.url != ENDPOINT:
        return BatchError(
            "invalid_url", f"url must be {ENDPOINT}, got {line.url[:100]!r}", param="url"
        )
    if not bytes(line.body).startswith(b"{"):
        return BatchError("invalid_request", "body must be an object", param="body")
    return line


class Validation:
    """Checks an input file line by line, without keeping it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._seen: set[bytes] = set()  # digests of custom ids: 16 bytes each
        self.total = 0
        self.errors: list[BatchError] = []

    def add(self, number: int, text: bytes) -> None:
        self.total += 1
        problem = self._problem(text)
        if problem is not None and len(self.errors) < MAX_ERRORS:
            self.errors.append(msgspec.structs.replace(problem, line=number))

    def _problem(self, text: bytes) -> BatchError | None:
        if len(text) > self._max_bytes:
            return BatchError("line_too_long", f"over {self._max_bytes} bytes; split the request")
        line = read_line(text)
        if isinstance(line, BatchError):
            return line
        key = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
        if key in self._seen:
            return BatchError(
                "duplicate_custom_id",
                f"custom_id {line.custom_id[:100]!r} is there twice",
                param="custom_id",
            )
        self._seen.add(key)
        return None

    @property
    def full(self) -> bool:
        """More lines than allowed: the rest need not be read."""
        return self.total > MAX_LINES

    def finish(self) -> list[BatchError]:
        """All that is wrong."""
        if self.full:
            return [BatchError("too_many_lines", f"at most {MAX_LINES} lines; split the file")]
        if not self.total:
            return [BatchError("empty_file", "the input file has no lines")]
        return self.errors


def seed_of(batch_id: str, line: int) -> int:
    """For a line without one: the same whenever the line is run."""
    key = hashlib.blake2b(f"{batch_id}\0{line}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "big") >> 1


def output_id(batch_id: str, kind: str) -> str:
    """Of a batch's output file: the same whenever it is written."""
    return f"file-{hashlib.sha256(f'{batch_id}/{kind}'.encode()).hexdigest()[:24]}"
