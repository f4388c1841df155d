"""What happened in a run, one JSON line each: the only thing that the checker reads.

Times are seconds of one monotonic clock, that of the process which ran the clients.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

Behaviour = Literal["reads", "leaves", "dawdles"]
Outcome = Literal[
    "complete",  # an answer, or a stream up to [DONE]
    "refused",  # 429 or 503
    "failed",  # any other status, or an error event in a stream
    "broken",  # the connection ended before the answer did
    "unreachable",  # no connection, or none that gave a status
    "left",  # the client went away on purpose
    "timeout",  # nothing came for longer than anybody waits
]


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all lines; "type" names the class."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    at: float
    data: str  # JSON


class Expected(Entry, frozen=True, kw_only=True):
    """The oracle's answer to one of the requests, without faults and unstreamed."""

    template: int
    body: dict[str, Any]
    answer: dict[str, Any]


class Asked(Entry, frozen=True, kw_only=True):
    """One request of the load, and everything that its client saw."""

    number: int
    template: int
    stream: bool
    behaviour: Behaviour
    sent: float
    ended: float
    outcome: Outcome
    status: int = 0
    retry_after: str | None = None
    chunks: list[Chunk] = []  # the events of a stream, or the body of an answer
    error: str = ""


class Fault(Entry, frozen=True, kw_only=True):
    """`healed`: when the first token came after it; `loading_s`: of that, for loading models."""

    number: int
    kind: str
    at: float
    healed: float | None
    loading_s: float = 0.0
    detail: str = ""
    problem: str = ""  # what the fault itself found wrong: an exit code, say


class Sample(Entry, frozen=True, kw_only=True):
    """What one process holds."""

    at: float
    role: str
    pid: int
    rss_mib: float
    files: int


class Ended(Entry, frozen=True, kw_only=True):
    """The last line: how the cluster ended."""

    at: float
    exit_code: int
    left_behind: list[str] = []  # processes that are still there
    crashed: str = ""  # of the run itself: why it ended early


Line = Expected | Asked | Fault | Sample | Ended


class History:
    """Appends lines to a file. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()

    def add(self, line: Line) -> None:
        data = self._encoder.encode(line) + b"\n"
        with self._lock:
            self._file.write(data)
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[Line]:
    """Every line of a history. Raises msgspec.ValidationError for what isn't one."""
    decoder = msgspec.json.Decoder(Line)
    with path.open("rb") as file:
        for raw in file:
            yield decoder.decode(raw)
