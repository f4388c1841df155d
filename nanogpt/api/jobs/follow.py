"""The events of a stored completion: replayed from its records, then followed to its end.

They are a function of the records alone, so an event has the same number and the same bytes
whenever it is asked for: what a dropped connection missed comes with `starting_after`.
"""

import time
from collections.abc import Callable, Iterator

from nanogpt.api import errors
from nanogpt.api.assemble import Assembler
from nanogpt.api.errors import ClientGone
from nanogpt.api.jobs import outcome
from nanogpt.api.plan import Plan
from nanogpt.api.response import DONE, PING, Stream, event
from nanogpt.errors import ApiError, NotFound
from nanogpt.jobs.store import Job, Store, StoreUnavailable
from nanogpt.tokenizer import Tokenizer

POLL_S = 1.0  # how long to wait before a ping
AWAY_S = 0.2  # between attempts to read, while the store is away


def news(
    store: Store, job_id: str, after: int, timeout_s: float = POLL_S
) -> tuple[Job | None, list[bytes]] | None:
    """What Store.read gives within that time; None while the store is away. Whoever works on the
    job goes on meanwhile, so who follows it waits as well, until the client or the server ends
    that."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return store.read(job_id, after, max(0.0, end - time.monotonic()))
        except StoreUnavailable:
            left = end - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(AWAY_S, left))


class _Events:
    """Turns records into events, those after number `after`."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, *, after: int, numbered: bool) -> None:
        self._stream = Stream(plan)
        self._assembler = Assembler(plan, tokenizer)
        self._after, self._numbered = after, numbered
        self._next = 0

    def of(self, record: bytes) -> bytes:
        deltas, _ = self._assembler.feed(outcome.progress(record).events)
        return b"".join(self._number(self._stream.chunks([delta])) for delta in deltas)

    def end(self) -> bytes:
        """Usage, when it was asked for, and the mark of the end."""
        usage = self._stream.end(self._assembler).removesuffix(DONE)
        return (self._number(usage) if usage else b"") + DONE

    def _number(self, chunk: bytes) -> bytes:
        number, self._next = self._next, self._next + 1
        if number <= self._after:
            return b""
        if not self._numbered:
            return chunk
        return chunk.removesuffix(b"}\n\n") + b',"sequence_number":%d}\n\n' % number


def follow(
    job: Job,
    store: Store,
    tokenizer: Tokenizer,
    *,
    after: int,
    numbered: bool,
    look_around: Callable[[], None],
) -> Iterator[bytes]:
    """The body of an event stream. `look_around` is called each second; it may raise ClientGone
    or an ApiError, which then is the last event."""
    yield b""  # has the headers sent at once
    try:
        yield from _follow(job, store, tokenizer, after, numbered, look_around)
    except ClientGone:
        return
    except ApiError as error:
        yield event(error.body())
    except Exception as error:
        yield event(errors.unexpected(error).body())


def _follow(
    job: Job,
    store: Store,
    tokenizer: Tokenizer,
    after: int,
    numbered: bool,
    look_around: Callable[[], None],
) -> Iterator[bytes]:
    events: _Events | None = None
    read = 0
    while True:
        found = news(store, job.id, read)
        look_around()
        if found is None:
            yield PING
            continue
        now, records = found
        if now is None:
            raise NotFound("the completion was deleted")
        if events is None:
            # A job may be planned anew before it begins, so its plan is read with its records.
            if records or now.ended:
                events = _Events(outcome.plan_of(now), tokenizer, after=after, numbered=numbered)
            else:
                yield PING
                continue
        read += len(records)
        text = b"".join(map(events.of, records))
        if text:
            yield text
        elif not records and now.ended:
            yield _last(events, now)
            return
        elif not records:
            yield PING


def _last(events: _Events, job: Job) -> bytes:
    if job.status == "completed":
        return events.end()
    return b"data: " + outcome.outcome_of(job).body + b"\n\n"
