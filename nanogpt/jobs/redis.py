"""Jobs in Redis, for any number of servers on any number of machines: see redis_scripts.py for how
they are kept.

Durable is what Redis has on its disk: with `appendonly yes` and `appendfsync always` everything
that was accepted, otherwise all but the last second or more.

A write whose answer got lost is made again until Redis says how it ended: only then can the caller
know what the job has. Each has a token, by which Redis knows it again.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from nanogpt.jobs import redis_scripts as scripts
from nanogpt.jobs.redis_link import Link, MaybeDone, pairs, text
from nanogpt.jobs.runner import Lease, LeaseLost
from nanogpt.jobs.store import (
    CROWDED,
    SWEEP_JOBS,
    Count,
    Job,
    Kind,
    Lane,
    Status,
    StoreUnavailable,
    Verdict,
    too_large,
    too_many,
)

log = logging.getLogger(__name__)

OVERHEAD_BYTES = 1000  # of a job, in keys and indices
BLOCK_S = 1.0  # how long one command waits for news
AGAIN_S = 0.1  # between attempts of a write whose answer got lost
READ_AGAIN_S = 1.0  # how long reads are tried again
SURE_S = 25.0  # how long such a write is tried; the lease has nearly run out by then

_jobs = msgspec.msgpack.Decoder(Job)
_encode = msgspec.msgpack.Encoder().encode


class Part(NamedTuple):
    """Content of a file on its way: the list P:part:NAME."""

    name: str
    pieces: int
    bytes: int


class RedisStore:
    """See Store. `namespace` tells apart what shares a Redis; `clock` is for tests. Does not
    connect yet. Raises ConfigError."""

    shared = True

    def __init__(
        self,
        url: str,
        *,
        max_queued: int,
        max_bytes: int,
        namespace: str = "nanogpt",
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._link = Link(url)
        self._prefix = f"{{{namespace}}}"
        self.namespace = namespace
        self._max_queued, self._max_bytes, self._clock = max_queued, max_bytes, clock

    def close(self) -> None:
        self._link.close()

    @property
    def link(self) -> Link:
        """For what else the servers tell each other there."""
        return self._link

    def check(self) -> None:
        """That it can be used as it is configured. Raises StoreUnavailable."""
        self.counts()
        if not self.is_durable():
            log.warning(
                "this Redis may lose what was accepted in its last second or more: set "
                "appendonly yes and appendfsync always"
            )

    def is_durable(self) -> bool:
        """Whether Redis has written to its disk what it answers; true also where it does not say,
        as with some that are rented. Raises StoreUnavailable."""
        answers = self._link.commands(
            ("CONFIG", "GET", "appendonly"), ("CONFIG", "GET", "appendfsync")
        )
        known: dict[str, bytes] = {}
        for answer in answers:
            if isinstance(answer, Exception):
                return True
            known.update(pairs(answer))
        return known == {"appendonly": b"yes", "appendfsync": b"always"} or not known

    def _key(self, *names: str) -> str:
        return ":".join((self._prefix, *names))

    def _run(self, script: str, *arguments: bytes | str | int | float) -> Any:
        now = "" if self._clock is None else repr(self._clock())
        return self._link.script(script, self._prefix, (now, *arguments))

    def _surely(self, script: str, *arguments: bytes | str | int | float) -> Any:
        """Run what may be run again, until it is known to be done or not. Raises MaybeDone when
        that takes too long; StoreUnavailable when nothing was done."""
        end = time.monotonic() + SURE_S
        unsure: MaybeDone | None = None
        while True:
            try:
                return self._run(script, *arguments)
            except MaybeDone as error:
                unsure = error
            except StoreUnavailable:
                if unsure is None:
                    raise
            if time.monotonic() > end:
                raise unsure
            time.sleep(AGAIN_S)

    def _again(self, ask: Callable[[], Any]) -> Any:
        """For what changes nothing: connections that a restart of Redis broke are no news."""
        end = time.monotonic() + READ_AGAIN_S
        while True:
            try:
                return ask()
            except MaybeDone:
                if time.monotonic() > end:
                    raise

    def put(self, job: Job) -> Job:
        return self._put(job)

    def put_file(self, job: Job, part: Part, lease: Lease | None) -> Job:
        """Accept a file's job, as `put` does, together with its content; under the lease of the
        job that made it, if one did. Raises LeaseLost; StoreUnavailable also when the content is
        no longer whole. The part is gone either way."""
        maker, fence = ("", 0) if lease is None else (lease.job.id, lease.job.fence)
        return self._put(job, *part, maker, fence)

    def _put(self, job: Job, *content: str | int) -> Job:
        spec = _encode(job)
        answer = self._surely(
            scripts.PUT,
            job.id,
            job.kind,
            job.owner,
            int(job.lane),
            job.created,
            job.keep_s,
            job.once,
            job.status,
            spec,
            len(spec) + OVERHEAD_BYTES,
            self._max_queued,
            self._max_bytes,
            *content,
        )
        if answer is None:
            return job
        found, more = answer
        if found == b"lost":
            raise LeaseLost(job.id)
        if found == b"part":
            raise StoreUnavailable("sending the file took too long; try again", retry_after=5)
        if found == b"queued":
            raise too_many(more, self._max_queued)
        if found == b"bytes":
            raise too_large(self._max_bytes)
        known = read_job(more)
        assert known is not None
        return known

    def claim(self, last: Lane, lease_s: float, timeout_s: float) -> Job | None:
        end = time.monotonic() + timeout_s
        while True:
            answer = self._run(scripts.CLAIM, int(last), lease_s)
            if isinstance(answer, list):
                return read_job(answer)
            left = end - time.monotonic()
            if left <= 0:
                return None
            self._wait(self._key("wake"), answer, left)
            if time.monotonic() >= end:
                return None

    def _wait(self, stream: str, last: bytes | str, seconds: float) -> None:
        """For an entry after the last one that is known."""
        block_ms = max(1, int(1000 * min(seconds, BLOCK_S)))
        self._link.command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", stream, last)

    def renew(self, held: Mapping[str, int], lease_s: float) -> dict[str, Verdict]:
        if not held:
            return {}
        pairs = (word for pair in held.items() for word in pair)
        answer = self._surely(scripts.RENEW, lease_s, *pairs)
        return {job_id: text(found) for job_id, found in zip(held, answer, strict=True)}

    def append(
        self, job_id: str, fence: int, records: Sequence[bytes], state: bytes | None = None
    ) -> Verdict:
        try:
            answer = self._surely(
                scripts.APPEND, job_id, fence, *_token(), *_optional(state), *records
            )
        except MaybeDone:
            return self._give_up(job_id)
        return text(answer)

    def _give_up(self, job_id: str) -> Verdict:
        """What the job has is not known here, so nobody may go on from here: whoever gets the
        lease next reads it."""
        log.error("job %s: the queue did not say whether a write was done: left to others", job_id)
        return "lost"

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
        try:
            answer = self._surely(
                scripts.COMPLETE,
                job_id,
                fence,
                *_token(),
                *_optional(state),
                status,
                result,
                int(forget_records),
                *records,
            )
        except MaybeDone:
            self._give_up(job_id)
            return False
        return bool(answer)

    def get(self, job_id: str) -> Job | None:
        return self._again(
            lambda: read_job(self._link.command("HGETALL", self._key("job", job_id)))
        )

    def find(self, once: str) -> Job | None:
        return self._again(lambda: read_job(self._run(scripts.FIND, once)))

    def read(
        self, job_id: str, after: int, timeout_s: float = 0.0, limit: int = 1000
    ) -> tuple[Job | None, list[bytes]]:
        end = time.monotonic() + timeout_s
        stream = self._key("records", job_id)
        while True:
            job, records = self._again(lambda: self._read(job_id, stream, after, limit))
            left = end - time.monotonic()
            if records or job is None or job.ended or left <= 0:
                return job, records
            self._wait(stream, f"0-{after}", left)

    def _read(
        self, job_id: str, stream: str, after: int, limit: int
    ) -> tuple[Job | None, list[bytes]]:
        *_, (fields, entries) = self._link.each(
            ("MULTI",),
            ("HGETALL", self._key("job", job_id)),
            ("XRANGE", stream, f"(0-{after}", "1-0", "COUNT", limit),
            ("EXEC",),
        )
        return read_job(fields), [entry[1][1] for entry in entries]

    def cancel(self, job_id: str) -> Job | None:
        return read_job(self._surely(scripts.CANCEL, job_id))

    def delete(self, job_id: str) -> bool:
        return bool(self._surely(scripts.DELETE, job_id))

    def page(
        self, kind: Kind, owner: str | None, *, after: str, limit: int, newest: bool
    ) -> list[Job]:
        return self._again(lambda: self._page(kind, owner, after, limit, newest))

    def _page(
        self, kind: Kind, owner: str | None, after: str, limit: int, newest: bool
    ) -> list[Job]:
        index = self._key("list", kind) if owner is None else self._key("list", kind, owner)
        first, last = ("+inf", "-inf") if newest else ("-inf", "+inf")
        if after:
            number = self._link.command("HGET", self._key("job", after), "number")
            if number is None:
                return []
            first = f"({int(number)}"
        order = "ZREVRANGEBYSCORE" if newest else "ZRANGEBYSCORE"
        ids = self._link.command(order, index, first, last, "LIMIT", 0, limit)
        if not ids:
            return []
        found = self._link.each(*(("HGETALL", self._key("job", text(i))) for i in ids))
        return [job for fields in found if (job := read_job(fields)) is not None]

    def counts(self) -> list[Count]:
        flat = self._again(lambda: self._link.command("HGETALL", self._key("counts")))
        found = []
        for name, jobs in pairs(flat):
            lane, status = name.split(":")
            if int(jobs):
                found.append(Count(Lane(int(lane)), _status(status), int(jobs)))
        return found

    def sweep(self) -> list[str]:
        crowded = int(CROWDED * self._max_bytes)
        return [text(gone) for gone in self._surely(scripts.SWEEP, SWEEP_JOBS, crowded)]


def _token() -> tuple[str]:
    return (secrets.token_hex(8),)


def _optional(state: bytes | None) -> tuple[int, bytes]:
    return (0, b"") if state is None else (1, state)


def _status(name: str) -> Status:
    return msgspec.convert(name, Status)


def read_job(flat: Any) -> Job | None:
    """The job with these fields; None without any."""
    if not flat:
        return None
    fields = dict(pairs(flat))

    def number(name: str) -> float | None:
        return float(fields[name]) if name in fields else None

    spec = _jobs.decode(fields["spec"])
    return msgspec.structs.replace(
        spec,
        status=_status(text(fields["status"])),
        fence=int(fields.get("fence", 0)),
        tries=int(fields.get("tries", 0)),
        cancelled=number("cancelled"),
        started=number("started"),
        finished=number("finished") if "finished" in fields else spec.finished,
        state=fields.get("state", spec.state),
        result=fields.get("result", spec.result),
    )
