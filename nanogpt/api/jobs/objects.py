"""Stored completions, files and batches as clients read them."""

from typing import Literal

import msgspec

from nanogpt.api.objects import Choice, ErrorDetail, Usage
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
