"""Time: a source that tests can replace, and how times are written."""

from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """The part of the module `time` that admission uses."""

    def time(self) -> float: ...
    def monotonic(self) -> float: ...


def utc(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339: "2027-01-31T12:00:00Z"."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")[:-6] + "Z"
