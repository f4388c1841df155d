"""The two loads that a front end has to carry: many open streams, and whole answers."""

import asyncio
import time
from collections.abc import Callable

import msgspec

from nanogpt.bench.connection import ConnectionLost
from nanogpt.bench.stamps import age_s
from nanogpt.bench.target import Target, post
from nanogpt.errors import StartupError

SETTLE_S = 2.0  # after the last stream has begun
Progress = Callable[[int], None]


class _Choice(msgspec.Struct):
    text: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Chunk).decode


class Streams(msgspec.Struct, frozen=True):
    """What open streams received while all of them were open."""

    streams: int
    seconds: float
    tokens: int
    chunks: int  # fewer than tokens where the front end was behind, and put some together
    lags_s: list[float]  # from making a token to receiving it, each token

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class _Follower:
    """Counts what arrives between two moments."""

    def __init__(self) -> None:
        self.begun = 0
        self.counting = False
        self.chunks = 0
        self.lags: list[float] = []

    def on_line(self) -> Callable[[bytes], None]:
        """For one stream."""
        first = True

        def line(data: bytes) -> None:
            nonlocal first
            if not data.startswith(b"data: {"):
                return
            if first:
                first = False
                self.begun += 1
            if self.counting:
                now = time.monotonic()
                self.chunks += 1
                for choice in _decode(data[6:]).choices:
                    self.lags += [age_s(character, now) for character in choice.text]

        return line


async def follow_streams(target: Target, streams: int, seconds: float) -> Streams:
    """Open `streams` streams, and watch them for so long once all of them run. They are left
    before their end. Raises StartupError when one fails."""
    follower = _Follower()
    body = _body(target, 1, 500_000, stream=True)
    tasks = [asyncio.create_task(_one(target, body, follower.on_line())) for _ in range(streams)]
    try:
        while follower.begun < streams:
            _raise_failed(tasks)
            await asyncio.sleep(0.05)
        await asyncio.sleep(SETTLE_S)
        follower.counting, started = True, time.monotonic()
        await asyncio.sleep(seconds)
        follower.counting, seconds = False, time.monotonic() - started
        _raise_failed(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Streams(streams, seconds, len(follower.lags), follower.chunks, follower.lags)


class Whole(msgspec.Struct, frozen=True):
    requests: int
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


async def whole_answers(target: Target, requests: int, n: int, max_tokens: int) -> Whole:
    """So many at once, unstreamed. Raises StartupError when one fails or lacks tokens."""
    body = _body(target, n, max_tokens, stream=False)
    started = time.monotonic()
    sizes = await asyncio.gather(*(_one(target, body, None) for _ in range(requests)))
    seconds = time.monotonic() - started
    for raw in sizes:
        texts = [choice.text for choice in _decode(raw).choices]
        if [len(text) for text in texts] != [max_tokens] * n:
            raise StartupError("the front end lost tokens: this is a bug")
    return Whole(requests, requests * n * max_tokens, seconds)


def _body(target: Target, n: int, max_tokens: int, *, stream: bool) -> bytes:
    return msgspec.json.encode(
        {
            "model": target.model,
            "prompt": [1],
            "n": n,
            "max_tokens": max_tokens,
            "stream": stream,
            "seed": 0,
        }
    )


async def _one(target: Target, body: bytes, on_line: Callable[[bytes], None] | None) -> bytes:
    try:
        reply = await post(target, body, on_line)
    except ConnectionLost as error:
        raise StartupError(f"a request failed: {error}") from error
    if reply.status != 200:
        raise StartupError(f"a request failed: {reply.status}: {reply.body[:200]!r}")
    return reply.body


def _raise_failed(tasks: list[asyncio.Task[bytes]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
            raise StartupError("a stream ended early")
