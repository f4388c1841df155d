"""Sliding windows in Redis, so that several servers share one limit.

The same slots as in windows.py: a hash from slot number to what was taken, which Redis drops
when it is old. Checking and taking all of a request's windows is one script, so one round trip.
Slots are numbered by the servers' clocks: keep those within a second of each other (NTP).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nanogpt.admission_config import AdmissionConfig
from nanogpt.api.admission.clock import Clock
from nanogpt.api.admission.windows import (
    SLOTS,
    WINDOW_S,
    Claim,
    Full,
    Level,
    Name,
    Taken,
    Window,
    Windows,
    level,
    longest_wait,
)
from nanogpt.errors import ConfigError, Unavailable

log = logging.getLogger("admission")

TIMEOUT_S = 0.25  # for Redis to connect, and to answer
RETRY_S = 1.0  # after a failure, how long it is left alone
T = TypeVar("T")

# KEYS: the windows. ARGV: the slot of now, the oldest that counts, the time to live in seconds,
# then limit and cost of each window. Takes all and returns nil; or none, and returns their slots.
_TAKE = """
local found, full = {}, false
for i, key in ipairs(KEYS) do
    local used = 0
    found[i] = redis.call('HGETALL', key)
    for j = 1, #found[i], 2 do
        if tonumber(found[i][j]) < tonumber(ARGV[2]) then
            redis.call('HDEL', key, found[i][j])
        else
            used = used + tonumber(found[i][j + 1])
        end
    end
    full = full or used + tonumber(ARGV[2 * i + 3]) > tonumber(ARGV[2 * i + 2])
end
if full then return found end
for i, key in ipairs(KEYS) do
    redis.call('HINCRBY', key, ARGV[1], ARGV[2 * i + 3])
    redis.call('EXPIRE', key, ARGV[3])
end
return nil
"""

# KEYS: the windows. ARGV: the slot, then the amount of each. A slot that is gone stays gone.
_GIVE_BACK = """
for i, key in ipairs(KEYS) do
    local taken = tonumber(redis.call('HGET', key, ARGV[1]) or 0)
    local amount = math.min(taken, tonumber(ARGV[i + 1]))
    if amount > 0 then redis.call('HINCRBY', key, ARGV[1], -amount) end
end
"""


def connect(url: str) -> Any:
    """A client for `url` that fails fast. Raises ConfigError; does not connect yet."""
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise ConfigError(
            "admission.redis_url needs the package redis: pip install redis"
        ) from error
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:  # the URL may hold a password, so it is not repeated
        raise ConfigError("admission.redis_url must be redis://HOST:PORT/DB") from error


class RedisWindows:
    """Every method raises redis.RedisError. `queue` tells apart who shares a Redis."""

    def __init__(self, client: Any, queue: str, clock: Clock, seconds: float) -> None:
        self._client, self._queue, self._clock = client, queue, clock
        self._slot_s = seconds / SLOTS
        self._ttl_s = int(seconds + self._slot_s) + 1
        self._take = client.register_script(_TAKE)
        self._give_back = client.register_script(_GIVE_BACK)

    def take(self, claims: Sequence[Claim]) -> Taken | Full:
        now = self._clock.time()
        slot = int(now // self._slot_s)
        costs = [number for claim in claims for number in (claim.limit, claim.cost)]
        found = self._take(
            keys=[self._key(claim.name) for claim in claims],
            args=[slot, slot - SLOTS, self._ttl_s, *costs],
        )
        if found is None:
            return Taken(tuple(claims), slot, shared=True)
        windows = [_window(zip(flat[::2], flat[1::2], strict=True), slot - SLOTS) for flat in found]
        full = longest_wait(claims, windows, self._slot_s, now)
        assert full is not None, "the script refuses when one is full"
        return full

    def give_back(self, taken: Taken, amount: int) -> None:
        self._give_back(
            keys=[self._key(claim.name) for claim in taken.claims],
            args=[taken.slot, *(min(amount, claim.cost) for claim in taken.claims)],
        )

    def close(self) -> None:
        self._client.close()

    def levels(self, claims: Sequence[Claim]) -> list[Level]:
        pipeline = self._client.pipeline(transaction=False)
        for claim in claims:
            pipeline.hgetall(self._key(claim.name))
        now = self._clock.time()
        oldest = int(now // self._slot_s) - SLOTS
        return [
            level(claim, _window(found.items(), oldest), self._slot_s, now)
            for claim, found in zip(claims, pipeline.execute(), strict=True)
        ]

    def _key(self, name: Name) -> str:
        """Braces: a Redis cluster has all windows of a key on one node, as a script needs it."""
        return f"{self._queue}:limits:{{{name.key}}}:{name.kind}:{name.user}"


def _window(found: Any, oldest: int) -> Window:
    pairs = sorted((int(slot), int(amount)) for slot, amount in found)
    kept = [pair for pair in pairs if pair[0] >= oldest]
    return Window([slot for slot, _ in kept], [amount for _, amount in kept])


class SharedWindows:
    """Redis while it answers; else this process's own windows, or 503 if so configured.

    What was taken on one side during a change is not known to the other: for a minute a client
    may get up to its limit from each.
    """

    def __init__(self, shared: RedisWindows, local: Windows, clock: Clock, refuse: bool) -> None:
        import redis  # it is there: `connect` made the client

        self._shared, self._local, self._clock, self._refuse = shared, local, clock, refuse
        self._error = redis.RedisError
        self._retry_at = float("-inf")
        self._down = False
        self.failures = 0

    def take(self, claims: Sequence[Claim]) -> Taken | Full:
        """Raises Unavailable when Redis is away and that is to refuse."""
        return self._ask(lambda: self._shared.take(claims), lambda: self._take_alone(claims))

    def levels(self, claims: Sequence[Claim]) -> list[Level]:
        return self._ask(lambda: self._shared.levels(claims), lambda: self._local.levels(claims))

    def give_back(self, taken: Taken, amount: int) -> None:
        if taken.shared:
            # If Redis is away the reservation stays until it is a minute old: the safe side.
            self._ask(lambda: self._shared.give_back(taken, amount), lambda: None)
        else:
            self._local.give_back(taken, amount)

    def close(self) -> None:
        self._shared.close()

    def _take_alone(self, claims: Sequence[Claim]) -> Taken | Full:
        if self._refuse:
            raise Unavailable(
                "limits can't be checked at the moment; try again soon", retry_after=2
            )
        return self._local.take(claims)

    def _ask(self, ask: Callable[[], T], instead: Callable[[], T]) -> T:
        if self._clock.monotonic() < self._retry_at:
            return instead()
        try:
            answer = ask()
        except self._error as error:
            self._failed(error)
            return instead()
        if self._down:
            self._down = False
            log.warning("Redis is back: limits are shared again")
        return answer

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._retry_at = self._clock.monotonic() + RETRY_S
        if not self._down:
            self._down = True
            means = "requests are refused" if self._refuse else "each server limits by itself"
            log.warning("Redis is away (%s): %s", type(error).__name__, means)


def make_shared(
    config: AdmissionConfig, queue: str, local: Windows, clock: Clock
) -> SharedWindows | None:
    """None when no Redis is configured. Raises ConfigError."""
    if not config.redis_url:
        return None
    shared = RedisWindows(connect(config.redis_url), queue, clock, WINDOW_S)
    return SharedWindows(shared, local, clock, refuse=config.redis_down == "refuse")
