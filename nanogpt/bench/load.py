"""Sends a workload to a server and notes when what comes back."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator

import msgspec

from nanogpt.bench.connection import ConnectionLost
from nanogpt.bench.outcome import Outcome, Recorder, error_message
from nanogpt.bench.target import Target, post
from nanogpt.bench.workload import Workload, bodies
from nanogpt.errors import StartupError

OnOutcome = Callable[[Outcome], None]


class Round(msgspec.Struct, kw_only=True):
    """One run of a workload."""

    outcomes: list[Outcome]
    seconds: float  # from the first request to the end of the last answer
    client_cpu: float  # share of one core that this process took

    @property
    def output_tokens(self) -> int:
        return sum(o.output_tokens for o in self.outcomes if o.ok)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    def check(self) -> None:
        """Raises StartupError when a request failed."""
        for outcome in self.outcomes:
            if not outcome.ok:
                raise StartupError(f"a request failed: {outcome.status}: {outcome.error:.200}")

    @property
    def requests_per_s(self) -> float:
        return sum(o.ok for o in self.outcomes) / self.seconds if self.seconds else 0.0


def run_round(
    target: Target, workload: Workload, seed: int, on_outcome: OnOutcome | None = None
) -> Round:
    """Run the workload once. The same seed sends the same prompts at the same intervals."""
    feed: Iterator[bytes] = bodies(workload, target.model, target.vocab_size, seed)
    if workload.requests is not None:
        feed = itertools.islice(feed, workload.requests)
        if workload.duration_s is None:
            feed = iter(list(feed))  # made before the clock starts
    return asyncio.run(_Load(target, workload, feed, seed, on_outcome or _ignore).run())


def warm_up(target: Target, workload: Workload, count: int, seed: int) -> list[Outcome]:
    """`count` requests of the workload's kind, in bursts of its size."""
    if not count:
        return []
    burst = min(count, workload.burst)
    once = msgspec.structs.replace(
        workload, rate=None, concurrency=burst, requests=count, duration_s=None
    )
    return run_round(target, once, seed).outcomes


def _ignore(outcome: Outcome) -> None:
    pass


class _Load:
    def __init__(
        self,
        target: Target,
        workload: Workload,
        feed: Iterator[bytes],
        seed: int,
        on_outcome: OnOutcome,
    ) -> None:
        self._target, self._workload, self._feed = target, workload, feed
        self._on_outcome = on_outcome
        self._rng = random.Random(f"arrivals {seed}")
        self._outcomes: list[Outcome] = []

    async def run(self) -> Round:
        cpu, started = time.process_time(), time.perf_counter()
        self._end_at = started + (self._workload.duration_s or float("inf"))
        async with asyncio.TaskGroup() as group:
            if self._workload.rate is None:
                for _ in range(self._workload.burst):
                    group.create_task(self._client())
            else:
                await self._arrivals(group, self._workload.rate)
        seconds = time.perf_counter() - started
        return Round(
            outcomes=self._outcomes,
            seconds=seconds,
            client_cpu=(time.process_time() - cpu) / seconds,
        )

    async def _client(self) -> None:
        """Closed loop: the next request when the last one is answered."""
        for body in self._feed:
            if time.perf_counter() >= self._end_at:
                return
            await self._send(body, time.perf_counter())

    async def _arrivals(self, group: asyncio.TaskGroup, rate: float) -> None:
        """Open loop: exponential intervals, whatever the server does. A request's time begins when
        it is due, so that one which has to wait for a place is not taken for a fast one."""
        places = asyncio.Semaphore(self._workload.concurrency or 1_000_000)
        due = time.perf_counter()
        for body in self._feed:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if due >= self._end_at:
                return
            await places.acquire()
            group.create_task(self._send(body, due)).add_done_callback(lambda _: places.release())
            due += self._rng.expovariate(rate)

    async def _send(self, body: bytes, started: float) -> None:
        clock = time.perf_counter
        outcome = Outcome(started=started, n=self._workload.n)
        recorder = Recorder(outcome)
        try:
            reply = await post(self._target, body, lambda line: recorder.line(line, clock()))
            outcome.ended, outcome.status = clock(), reply.status
            if reply.status != 200:
                outcome.error = error_message(reply.body)
            else:
                if reply.body:  # it was not streamed
                    recorder.whole(reply.body)
                recorder.end()
        except ConnectionLost as error:
            outcome.ended, outcome.error = clock(), str(error)
        self._outcomes.append(outcome)
        self._on_outcome(outcome)
