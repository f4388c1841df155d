"""Stored completions, files and batches as clients read them."""

from typing import Literal

import msgspec

from nanogpt.api.objects import Choice, ErrorDetail, Usage
from nanogpt.jobs.batches import BatchError
from nanogpt.jobs.store import Status


class StoredCompletion(msgspec.Struct):
    """A completion that is kept. `choices` is empty until there is something to show: all of them
    when it is completed, and what there is when it was cancelled or is incomplete."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    status: Status
    background: bool
    metadata: dict[str, str]
    choices: list[Choice]
    usage: Usage | None
    error: ErrorDetail | None


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool = True


class FileObject(msgspec.Struct):
    """A file that was uploaded, or that a batch wrote."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class BatchErrors(msgspec.Struct):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class Batch(msgspec.Struct, kw_only=True):
    """Many completions at once, by and by. Times are seconds since the epoch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(msgspec.Struct):
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class LineResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct):
    code: str
    message: str


class OutputLine(msgspec.Struct):
    """One line of a batch's output or error file: `response`, or `error` when it was not run."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None
