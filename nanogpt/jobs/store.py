"""What a job is, and what any store of jobs does.

A job is accepted with `put`, worked on under a lease, and ended once. Whoever claims it gets a
fence number, larger than any before; a write with an older one is refused, so a worker that was
thought dead can do no harm. Delivery is at least once, the terminal result exactly once.

    queued ──claim──► in_progress ──complete──► completed | failed | cancelled | incomplete
       │                 │    ▲
       │                 └────┘ claim, when the lease has run out
       └──cancel──► cancelled
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

import msgspec

from nanogpt.errors import Unavailable

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]
Kind = Literal["completion", "generate", "batch", "file"]
Verdict = Literal["held", "cancelled", "lost"]

ONCE_S = 24 * 3600.0  # how long an idempotency name stands for its job
SWEEP_JOBS = 1000  # at once, so that others get a turn
CROWDED = 0.9  # of the bytes: above it, answers kept only for a repeat of their request make room


class StoreUnavailable(Unavailable):
    """The store can't be written or read now; what was kept is unharmed."""


def too_many(queued: int, most: int) -> Unavailable:
    """More jobs than may be queued."""
    return Unavailable(
        f"{queued} jobs are queued, the limit is {most}; try again later", retry_after=10
    )


def too_large(max_bytes: int) -> Unavailable:
    """More is kept than may be."""
    return Unavailable(
        f"stored completions and batches take more than {max_bytes // 10**6} MB; "
        "delete some, or wait until they expire",
        retry_after=60,
    )


class Lane(IntEnum):
    """Which jobs go first. Somebody waits for those of NOW."""

    NOW = 0
    BACKGROUND = 1
    BATCH = 2


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One unit of accepted work. Times are seconds since the epoch.

    `request`, `state`, `result` and the records beside it are the executor's: the store keeps
    bytes. A file is a job that is complete from the start.
    """

    id: str
    kind: Kind
    owner: str  # the name of an API key
    created: float
    request: bytes
    keep_s: float  # how long it is kept after its end
    lane: Lane = Lane.BACKGROUND
    once: str = ""  # while it is remembered, no other job is accepted under this name
    digest: bytes = b""  # of what was asked under that name
    # The store's part.
    status: Status = "queued"
    fence: int = 0
    tries: int = 0  # claims since the last progress
    cancelled: float | None = None  # when it was asked to stop
    started: float | None = None
    finished: float | None = None
    state: bytes = b""
    result: bytes = b""

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")


class Count(NamedTuple):
    """Jobs of one lane and status."""

    lane: Lane
    status: Status
    jobs: int


class Store(Protocol):
    """Thread-safe. Every method may raise StoreUnavailable; what it said is done is durable."""

    @property
    def shared(self) -> bool:
        """Whether other machines use it too: then files are there as well, and leases are short."""

    def put(self, job: Job) -> Job:
        """Accept the job. With a name in `once` that another job has: that one, unchanged.

        Raises Unavailable when too many are queued or too much is kept.
        """

    def claim(self, last: Lane, lease_s: float, timeout_s: float) -> Job | None:
        """Take the first job of the lanes up to `last` that is queued or whose lease has run out,
        after waiting up to `timeout_s` seconds for one. Nothing is taken later than that: who
        waited renews what it holds first, should the wait have been a long pause."""

    def renew(self, held: Mapping[str, int], lease_s: float) -> dict[str, Verdict]:
        """Prolong leases, given as fences by job id. 0 seconds give the jobs back to the queue."""

    def append(
        self, job_id: str, fence: int, records: Sequence[bytes], state: bytes | None = None
    ) -> Verdict:
        """Add to the job's records, and replace its state; nothing when the lease is lost."""

    def complete(
        self,
        job_id: str,
        fence: int,
        status: Status,
        result: bytes,
        *,
        records: Sequence[bytes] = (),
        state: bytes | None = None,
        forget_records: bool = False,
    ) -> bool:
        """End the job, and its lease. False, and nothing done, when the lease is lost."""

    def get(self, job_id: str) -> Job | None: ...

    def find(self, once: str) -> Job | None:
        """The job with this idempotency name, while that is remembered."""

    def read(
        self, job_id: str, after: int, timeout_s: float = 0.0, limit: int = 1000
    ) -> tuple[Job | None, list[bytes]]:
        """The job, and its records from number `after` on, counted from 0, both as of one moment;
        waits up to `timeout_s` for a record or the job's end. When the job had ended and nothing
        comes, that is all."""

    def cancel(self, job_id: str) -> Job | None:
        """Ask for the end: at once while queued, otherwise whoever holds the lease is told."""

    def delete(self, job_id: str) -> bool:
        """Forget it, with its records and name. Its holder loses the lease."""

    def page(
        self, kind: Kind, owner: str | None, *, after: str, limit: int, newest: bool
    ) -> list[Job]:
        """Of one owner (None: of all), from the one behind `after` ("": from the first) on."""

    def counts(self) -> list[Count]: ...

    def sweep(self) -> list[str]:
        """Forget what was kept long enough, and, when there is hardly room for more, the oldest of
        what has ended in the lane NOW. A part at a time: returns the ids, none when all is done.
        """

    def close(self) -> None: ...
