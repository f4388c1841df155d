"""Sliding windows, in memory and in Redis, and the limits that are made from them."""

import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fakeredis
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.admission_config import Limits
from nanogpt.api.admission.keys import Principal
from nanogpt.api.admission.limits import Limiter
from nanogpt.api.admission.redis_windows import RETRY_S, RedisWindows, SharedWindows, connect
from nanogpt.api.admission.windows import WINDOW_S, Claim, Full, MemoryWindows, Name, Taken
from nanogpt.errors import ConfigError, InvalidRequest, RateLimited, Unavailable
from tests.admission_utils import FakeClock

ALICE = Name("tokens", "team-a", "alice")
TEAM = Name("tokens", "team-a", "")


@pytest.fixture(scope="module")
def redis_client(tmp_path_factory):
    """A real server where there is one, else its double with real Lua."""
    if shutil.which("redis-server") is None:
        yield fakeredis.FakeRedis()
        return
    path = tmp_path_factory.mktemp("redis") / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=str(path))
    try:
        for _ in range(100):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        yield client
    finally:
        client.close()
        server.terminate()
        server.wait()


@pytest.fixture(scope="module", params=["memory", "redis"])
def make_windows(request):
    client = request.getfixturevalue("redis_client") if request.param == "redis" else None

    def make(clock):
        if client is None:
            return MemoryWindows(clock, WINDOW_S, max_users=1000)
        client.flushall()
        return RedisWindows(client, "nanogpt", clock, WINDOW_S)

    return make


steps = st.lists(
    st.tuples(st.floats(0, 40, allow_nan=False), st.integers(0, 12), st.integers(0, 12)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(schedule=steps, limit=st.integers(12, 30))
def test_no_interval_of_a_window_holds_more_than_the_limit(make_windows, schedule, limit):
    """Whatever the schedule, and whatever is given back at once or later: what remains taken."""
    clock = FakeClock()
    windows = make_windows(clock)
    admitted = []  # (time, tokens kept)
    for pause, cost, returned in schedule:
        clock.advance(pause)
        taken = windows.take([Claim(ALICE, limit, cost)])
        if isinstance(taken, Taken):
            windows.give_back(taken, returned)
            admitted.append((clock.now, max(0, cost - returned)))
        (level,) = windows.levels([Claim(ALICE, limit, 0)])
        assert 0 <= level.used <= limit
        assert 0 <= level.remaining <= limit
    for start, _ in admitted:
        assert sum(kept for at, kept in admitted if start <= at <= start + WINDOW_S) <= limit


@settings(max_examples=60, deadline=None)
@given(schedule=steps, limit=st.integers(12, 30))
def test_a_refused_claim_fits_after_the_wait(make_windows, schedule, limit):
    clock = FakeClock()
    windows = make_windows(clock)
    for pause, cost, _ in schedule:
        clock.advance(pause)
        claim = Claim(ALICE, limit, cost)
        full = windows.take([claim])
        if isinstance(full, Full):
            assert 0 < full.wait_s <= WINDOW_S + 1
            clock.advance(full.wait_s - 0.001)
            assert isinstance(windows.take([claim]), Full)
            clock.advance(0.002)
            assert isinstance(windows.take([claim]), Taken)


@settings(max_examples=60, deadline=None)
@given(schedule=steps)
def test_memory_and_redis_decide_alike(redis_client, schedule):
    clock = FakeClock()
    redis_client.flushall()
    memory, shared = (
        MemoryWindows(clock, WINDOW_S, 100),
        RedisWindows(redis_client, "nanogpt", clock, WINDOW_S),
    )
    for pause, cost, returned in schedule:
        clock.advance(pause)
        claims = [Claim(TEAM, 40, cost), Claim(ALICE, 20, cost)]
        ours, theirs = memory.take(claims), shared.take(claims)
        assert ours[:2] == theirs[:2]
        if isinstance(ours, Taken):
            memory.give_back(ours, returned)
            shared.give_back(theirs, returned)
        assert memory.levels(claims) == shared.levels(claims)


def test_all_claims_or_none(make_windows):
    windows = make_windows(FakeClock())
    assert isinstance(windows.take([Claim(ALICE, 10, 8)]), Taken)
    full = windows.take([Claim(TEAM, 100, 5), Claim(ALICE, 10, 5)])
    assert isinstance(full, Full)
    assert full.claim.name == ALICE
    assert [level.used for level in windows.levels([Claim(TEAM, 100, 0)])] == [0]


def test_what_is_given_back_late_does_not_count_twice(make_windows):
    """A long generation settles when its reservation has already left the window."""
    clock = FakeClock()
    windows = make_windows(clock)
    old = windows.take([Claim(ALICE, 10, 8)])
    clock.advance(WINDOW_S + 2)
    windows.take([Claim(ALICE, 10, 3)])
    windows.give_back(old, 8)
    assert windows.levels([Claim(ALICE, 10, 0)])[0].used == 3


def test_users_with_odd_names_have_windows_of_their_own(make_windows):
    windows = make_windows(FakeClock())
    users = ["a", "a:b", "{a}", "a\nb", "a\x00", "ä", "*"]
    for user in users:
        assert isinstance(windows.take([Claim(Name("tokens", "k", user), 1, 1)]), Taken), user


def test_a_million_users_do_not_grow_memory_nor_reset_their_key():
    windows = MemoryWindows(FakeClock(), WINDOW_S, max_users=100)
    for number in range(10_000):
        user = Name("requests", "team-a", f"user {number}")
        windows.take([Claim(Name("requests", "team-a", ""), 10_000, 1), Claim(user, 5, 1)])
    assert len(windows) == 101
    assert isinstance(windows.take([Claim(Name("requests", "team-a", ""), 10_000, 1)]), Full)


def test_racing_threads_get_exactly_the_limit(make_windows):
    windows = make_windows(FakeClock())
    barrier = threading.Barrier(16)

    def race(_):
        barrier.wait()
        return sum(isinstance(windows.take([Claim(ALICE, 100, 1)]), Taken) for _ in range(20))

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(race, range(16))) == 100


# Limits of a key and its users


def principal(requests=0, tokens=0, user_requests=0, user_tokens=0, admin=False):
    return Principal(
        key_name="team-a",
        admin=admin,
        limits=Limits(requests_per_minute=requests, tokens_per_minute=tokens),
        user_limits=Limits(requests_per_minute=user_requests, tokens_per_minute=user_tokens),
    )


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def limiter(clock):
    return Limiter(MemoryWindows(clock, WINDOW_S, 1000))


def test_the_headers_are_of_whichever_has_less_left(limiter):
    who = principal(requests=100, tokens=1000, user_requests=10, user_tokens=5000)
    limiter.take_request(who, "alice")
    limiter.reserve_tokens(who, "alice", 300)
    assert limiter.headers(who, "alice") == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "700",
        "x-ratelimit-reset-tokens": "1m1s",
    }


def test_no_limits_no_headers(limiter):
    limiter.take_request(principal(), "alice")
    assert limiter.headers(principal(), "alice") == {}
    assert limiter.headers(principal(requests=1, admin=True), "alice") == {}


def test_retry_after_is_when_it_works_again(limiter, clock):
    who = principal(user_requests=2)
    limiter.take_request(who, "alice")
    clock.advance(30)
    limiter.take_request(who, "alice")
    with pytest.raises(RateLimited) as refused:
        limiter.take_request(who, "alice")
    seconds = int(refused.value.headers["Retry-After"])
    assert refused.value.code == "requests"
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    assert 30 <= seconds <= 31
    limiter.take_request(who, "bob")
    limiter.take_request(who, "")  # without user only the key counts
    clock.advance(seconds)
    limiter.take_request(who, "alice")


def test_tokens_are_reserved_then_settled_once(limiter):
    who = principal(tokens=100)
    ticket = limiter.reserve_tokens(who, "alice", 90)
    with pytest.raises(RateLimited) as refused:
        limiter.reserve_tokens(who, "alice", 20)
    assert refused.value.code == "tokens"
    ticket.settle(10, 5)
    ticket.settle(0, 0)
    assert limiter.levels(who, "")[0].used == 15


def test_settling_more_than_was_reserved_takes_no_more(limiter):
    who = principal(tokens=100)
    limiter.reserve_tokens(who, "", 60).settle(50, 900)
    assert limiter.levels(who, "")[0].used == 60


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(-5, 60), st.integers(-5, 60))))
def test_settling_never_leaves_less_than_nothing_or_more_than_all(requests):
    limiter = Limiter(MemoryWindows(FakeClock(), WINDOW_S, 1000))
    who = principal(tokens=100, user_tokens=70)
    for cost, prompt, completion in requests:
        try:
            ticket = limiter.reserve_tokens(who, "alice", cost)
        except RateLimited:
            continue
        ticket.settle(prompt, completion)
        for level in limiter.levels(who, "alice"):
            assert 0 <= level.used <= level.limit


def test_racing_settles_give_back_once(limiter):
    who = principal(tokens=1000)
    tickets = [limiter.reserve_tokens(who, "", 20) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda ticket: ticket.settle(5, 5), tickets * 8))
    assert limiter.levels(who, "")[0].used == 400


def test_a_request_larger_than_the_limit_is_told_so(limiter):
    """Waiting would never help, so it is no 429."""
    with pytest.raises(InvalidRequest, match=r"up to 101 tokens.* limit of 100 .*lower max_tokens"):
        limiter.reserve_tokens(principal(tokens=100), "", 101)


# Redis that is not there


class Flaky(RedisWindows):
    """Redis that can be cut off."""

    away = False
    calls = 0

    def take(self, claims):
        self.calls += 1
        if self.away:
            raise redis.ConnectionError("cut off")
        return super().take(claims)

    def give_back(self, taken, amount):
        if self.away:
            raise redis.ConnectionError("cut off")
        super().give_back(taken, amount)


def flaky(client, clock, refuse):
    client.flushall()
    shared = Flaky(client, "nanogpt", clock, WINDOW_S)
    return shared, SharedWindows(shared, MemoryWindows(clock, WINDOW_S, 100), clock, refuse)


def test_without_redis_each_server_limits_by_itself(redis_client, clock, caplog):
    shared, windows = flaky(redis_client, clock, refuse=False)
    before = windows.take([Claim(TEAM, 2, 1)])
    shared.away = True
    assert isinstance(windows.take([Claim(TEAM, 2, 2)]), Taken)
    assert isinstance(windows.take([Claim(TEAM, 2, 1)]), Full), "limited here"
    windows.give_back(before, 1)  # is lost: not an error of the request
    assert windows.failures == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    shared.away = False
    clock.advance(RETRY_S)
    assert isinstance(windows.take([Claim(TEAM, 2, 1)]), Taken)
    assert isinstance(windows.take([Claim(TEAM, 2, 1)]), Full), "Redis still knows the first"
    assert "back" in caplog.messages[-1]


def test_a_redis_that_is_away_is_left_alone_for_a_while(redis_client, clock):
    shared, windows = flaky(redis_client, clock, refuse=False)
    shared.away = True
    for _ in range(10):
        windows.take([Claim(TEAM, 100, 1)])
    assert shared.calls == 1
    clock.advance(RETRY_S)
    windows.take([Claim(TEAM, 100, 1)])
    assert shared.calls == 2


def test_without_redis_requests_are_refused_if_so_configured(redis_client, clock):
    shared, windows = flaky(redis_client, clock, refuse=True)
    taken = windows.take([Claim(TEAM, 2, 1)])
    shared.away = True
    with pytest.raises(Unavailable):
        windows.take([Claim(TEAM, 2, 1)])
    # An answer that is there already must not fail: neither when it settles nor for its headers.
    windows.give_back(taken, 1)
    assert [level.remaining for level in windows.levels([Claim(TEAM, 2, 0)])] == [2]


def test_a_redis_that_nobody_listens_at(clock):
    with socket.socket() as unused:  # bound, but nobody accepts
        unused.bind(("127.0.0.1", 0))
        client = connect(f"redis://127.0.0.1:{unused.getsockname()[1]}/0")
        windows = RedisWindows(client, "nanogpt", clock, WINDOW_S)
        with pytest.raises(redis.ConnectionError):
            windows.take([Claim(TEAM, 2, 1)])
        client.close()


def test_a_url_that_is_no_redis_is_not_repeated():
    with pytest.raises(ConfigError) as refused:
        connect("http://:secret@host")
    assert "secret" not in str(refused.value)
