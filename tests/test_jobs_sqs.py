"""What only the store with SQS does: messages may be lost, doubled, foreign or late, and Redis
decides all the same."""

import contextlib
import subprocess
import threading
import time

import pytest

from nanogpt.config import ServeConfig, convert
from nanogpt.errors import ConfigError, StartupError
from nanogpt.jobs import sqs as sqs_module
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.sqs import SqsStore
from nanogpt.jobs.store import Job, Lane, StoreUnavailable
from nanogpt.network import free_port
from tests.redis_server import redis_server
from tests.server import ROOT
from tests.sqs_server import ACCOUNT, CREDENTIALS, REGION, sqs_server

LEASE_S = 30.0
WAIT_S = 30.0  # a busy machine may take long; a test never waits for this when all is well


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def sqs():
    with sqs_server() as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


class Queue:
    """One deployment, opened as often as a test likes."""

    def __init__(self, sqs, redis, stack) -> None:
        self._sqs, self._redis, self._stack = sqs, redis, stack
        self.url = sqs.make()
        self.namespace = self.url.rpartition("/")[2].partition("?")[0]

    def open(self, url: str | None = None) -> SqsStore:
        limits = {"max_queued": 1000, "max_bytes": 10**9, "namespace": self.namespace}
        store = SqsStore(url or self.url, self._redis.url, look_s=0.0, **limits)
        self._stack.callback(store.close)
        return store

    def open_redis(self) -> RedisStore:
        """As an enqueuer that dies before it has sent the message."""
        limits = {"max_queued": 1000, "max_bytes": 10**9, "namespace": self.namespace}
        store = RedisStore(self._redis.url, **limits)
        self._stack.callback(store.close)
        return store

    def raw(self, lane: Lane) -> str:
        return f"http://127.0.0.1:{self._sqs.port}/{ACCOUNT}/{self.namespace}-{lane.name.lower()}"

    def messages(self, lane: Lane = Lane.BACKGROUND) -> int:
        """Visible or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        client = self._sqs.client()
        found = client.get_queue_attributes(QueueUrl=self.raw(lane), AttributeNames=names)
        client.close()
        return sum(int(found["Attributes"][name]) for name in names)

    def send(self, text: str, lane: Lane = Lane.BACKGROUND) -> None:
        client = self._sqs.client()
        client.send_message(QueueUrl=self.raw(lane), MessageBody=text)
        client.close()

    def lose_all(self) -> None:
        self._sqs.purge(self.url)


@pytest.fixture
def queue(sqs, redis):
    with contextlib.ExitStack() as stack:
        yield Queue(sqs, redis, stack)


def job(name: str, **fields) -> Job:
    known = {"kind": "completion", "owner": "a", "created": 0.0, "request": b"", "keep_s": 100.0}
    return Job(**{"id": name, **known, **fields})


def claim(store, lease_s: float = LEASE_S) -> Job | None:
    return store.claim(Lane.BATCH, lease_s, 0.0)


def eventually(condition):
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


def test_each_lane_has_a_queue_and_a_message_goes_with_its_job(queue):
    store = queue.open()
    for lane in Lane:
        store.put(job(lane.name, lane=lane))
        assert queue.messages(lane) == 1
    for lane in Lane:
        held = claim(store)
        assert held.id == lane.name
        assert store.complete(held.id, held.fence, "completed", b"")
        eventually(lambda lane=lane: queue.messages(lane) == 0)


def test_whoever_waits_is_told_at_once(queue):
    store = queue.open()
    found: list[Job | None] = []
    waiting = threading.Thread(target=lambda: found.append(store.claim(Lane.BATCH, LEASE_S, 20.0)))
    waiting.start()
    time.sleep(0.3)
    started = time.monotonic()
    store.put(job("j", lane=Lane.NOW))
    waiting.join()
    assert found[0].id == "j"
    assert time.monotonic() - started < 10  # neither its own patience nor that of a request


def test_what_is_received_but_not_wanted_goes_to_others(queue):
    """Ten come at a time; this one takes one of them."""
    first, second = queue.open(), queue.open()
    for i in range(5):
        first.put(job(f"j{i}"))
    assert first.claim(Lane.BATCH, LEASE_S, 10.0) is not None
    found = [eventually(lambda: claim(second)).id for _ in range(4)]
    assert len(set(found)) == 4


def test_an_enqueuer_that_dies_before_it_sends_loses_nothing(queue, monkeypatch):
    monkeypatch.setattr(sqs_module, "SENDING_S", 0.3)
    queue.open_redis().put(job("j"))
    store = queue.open()
    assert claim(store) is None  # perhaps it is just about to send
    assert eventually(lambda: claim(store)).id == "j"


def test_messages_that_get_lost_are_sent_again(queue, monkeypatch):
    monkeypatch.setattr(sqs_module, "LOST_S", 0.5)
    store = queue.open()
    store.put(job("j"))
    queue.lose_all()
    assert claim(store) is None
    assert eventually(lambda: claim(store)).id == "j"


def test_a_job_that_was_taken_is_missed_as_early_as_a_new_one(queue):
    """Its earlier messages were received, so they say nothing of the next one."""
    store = queue.open()
    store.put(job("j"))
    for _ in range(5):
        store.renew({"j": claim(store).fence}, 0.0)
    given_up = float(store.link.command("ZSCORE", store._key("sent"), "j"))
    assert given_up - time.time() < 1.5 * sqs_module.LOST_S


def test_a_queue_that_fails_holds_up_its_own_lane_only(queue, monkeypatch):
    """Neither what can't be sent nor what can't be received keeps others from their turn."""
    monkeypatch.setattr(sqs_module, "SENDING_S", 0.1)
    store, is_broken = queue.open(), threading.Event()
    is_broken.set()
    for method in ("send", "receive"):
        real = getattr(store._queues, method)

        def ask(lane, *arguments, real=real):
            if lane is Lane.NOW and is_broken.is_set():
                raise StoreUnavailable("there is no such queue")
            return real(lane, *arguments)

        monkeypatch.setattr(store._queues, method, ask)
    queue.open_redis().put(job("stuck", lane=Lane.NOW))  # for want of a message
    for i in range(3):
        store.put(job(f"j{i}"))
        assert store.claim(Lane.BATCH, LEASE_S, WAIT_S).id == f"j{i}"
        time.sleep(0.6)  # so that the other lane is asked again
    is_broken.clear()
    assert store.claim(Lane.BATCH, LEASE_S, WAIT_S).id == "stuck"


def test_a_queue_that_does_not_answer_holds_up_its_own_lane_only(queue, monkeypatch):
    """Whoever claims neither waits for what is sent nor for what is received."""
    monkeypatch.setattr(sqs_module, "SENDING_S", 0.1)
    store, answers = queue.open(), threading.Event()
    for method in ("send", "receive"):
        real = getattr(store._queues, method)

        def ask(lane, *arguments, real=real):
            if lane is Lane.NOW:
                assert answers.wait(WAIT_S), "somebody waited for this queue"
            return real(lane, *arguments)

        monkeypatch.setattr(store._queues, method, ask)
    queue.open_redis().put(job("stuck", lane=Lane.NOW))  # for want of a message
    try:
        for i in range(3):
            store.put(job(f"j{i}"))
            assert store.claim(Lane.BATCH, LEASE_S, WAIT_S).id == f"j{i}"
            time.sleep(0.2)  # so that the other lane's message is missed
    finally:
        answers.set()
    assert store.claim(Lane.BATCH, LEASE_S, WAIT_S).id == "stuck"


def test_the_end_of_an_old_lease_leaves_the_message_of_a_later_one(queue):
    store = queue.open()
    store.put(job("j"))
    old = claim(store, 0.5)
    new = eventually(lambda: claim(store, 2 * WAIT_S))  # and hidden for so long
    assert store.append("j", old.fence, [b"late"]) == "lost"
    assert store.complete("j", new.fence, "completed", b"")
    # That of the old lease goes when it comes.
    eventually(lambda: claim(store) is None and queue.messages() == 0)


def test_doubled_and_late_messages_change_nothing(queue):
    store, other = queue.open(), queue.open()
    store.put(job("j"))
    double = f'{{"job":"j","name":"{queue.namespace}"}}'
    queue.send(double)
    held = claim(store)
    assert claim(other) is None
    assert store.append("j", held.fence, [b"0"]) == "held"
    assert store.complete("j", held.fence, "completed", b"r")
    queue.send(double)
    assert claim(other) is None
    assert (store.get("j").result, store.get("j").fence) == (b"r", held.fence)
    queue.send(f'{{"job":"never-was","name":"{queue.namespace}"}}')
    assert claim(other) is None


@pytest.mark.parametrize("text", ["hello", "{}", '{"job":"j","name":"another"}', "[1]"])
def test_messages_of_others_are_left_to_them(queue, text):
    store = queue.open()
    store.put(job("j"))
    queue.send(text)
    assert [held.id for held in (claim(store), claim(store)) if held] == ["j"]
    assert queue.messages() == 2


def test_a_message_is_hidden_as_long_as_its_lease_is_renewed(queue):
    """Longer than SQS was first told to hide it."""
    store = queue.open()
    store.put(job("j"))
    held = claim(store, 1.0)
    assert store.renew({"j": held.fence}, LEASE_S) == {"j": "held"}
    time.sleep(1.5)
    raw = queue.open()._queues
    assert raw.receive(Lane.BACKGROUND, 1, 0, 30) == []


def test_a_holder_that_dies_is_replaced_when_its_lease_ends(queue):
    first, second = queue.open(), queue.open()
    first.put(job("j"))
    held = claim(first, 0.5)
    again = eventually(lambda: claim(second))
    assert again.fence > held.fence
    assert not first.complete("j", held.fence, "completed", b"late")
    assert second.complete("j", again.fence, "completed", b"")


def test_what_is_given_back_is_there_at_once(queue):
    first, second = queue.open(), queue.open()
    first.put(job("j"))
    held = claim(first)
    first.renew({"j": held.fence}, 0.0)
    assert claim(second).id == "j"
    assert queue.messages() == 1


def test_what_can_not_be_sent_is_not_accepted(queue):
    """Nothing is half done: the job is gone from Redis as well."""
    store = queue.open(f"sqs+http://127.0.0.1:{free_port()}/{ACCOUNT}/x?region={REGION}")
    with pytest.raises(StoreUnavailable, match="the queue can't be used now") as error:
        store.put(job("j", once="n"))
    assert error.value.headers["Retry-After"]
    assert (store.get("j"), store.find("n"), store.counts()) == (None, None, [])
    for timeout_s in (0.0, 5.0):
        with pytest.raises(StoreUnavailable):
            store.claim(Lane.BATCH, LEASE_S, timeout_s)


# Mistakes


def check(sqs_url: str, redis_url: str) -> None:
    store = SqsStore(sqs_url, redis_url, max_queued=1, max_bytes=1)
    try:
        store.check()
    finally:
        store.close()


def test_queues_that_are_not_there_are_told_at_the_start(sqs, redis):
    with pytest.raises(StartupError, match=r"no queue .*/nothing-now: .*-background and -batch"):
        check(sqs.url("nothing"), redis.url)


def test_a_queue_that_does_not_answer_may_come_back(redis):
    with pytest.raises(StoreUnavailable, match="Could not connect"):
        check(f"sqs+http://127.0.0.1:{free_port()}/{ACCOUNT}/x?region={REGION}", redis.url)


def test_what_is_not_sqs_is_said(redis):
    """Redis answers to HTTP by hanging up."""
    with pytest.raises(StoreUnavailable, match="the queue can't be used now"):
        check(f"sqs+http://127.0.0.1:{redis.port}/{ACCOUNT}/x?region={REGION}", redis.url)


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


def test_missing_credentials_are_told_at_the_start(sqs, redis, no_credentials):
    with pytest.raises(StartupError, match=r"SQS needs credentials .*AWS_ACCESS_KEY_ID"):
        check(sqs.make(), redis.url)


def test_a_region_is_needed(redis, monkeypatch, no_credentials):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"\?region=REGION"):
        check("sqs://localhost/1/x", redis.url)


def test_the_region_is_that_of_the_host(redis):
    store = SqsStore(
        "sqs://sqs.eu-west-3.amazonaws.com/123456789012/x", redis.url, max_queued=1, max_bytes=1
    )
    assert store._queues._client.meta.region_name == "eu-west-3"
    store.close()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"url": "sqs://host/1/q"}, "--results redis://"),
        ({"url": "sqs://host/q", "results": "redis://r"}, "sqs://HOST/ACCOUNT/NAME"),
        ({"url": "sqs://k:s@host/1/q", "results": "redis://r"}, "must not hold credentials"),
        ({"url": "sqs://host/1/q.fifo", "results": "redis://r"}, "standard queues"),
        ({"url": "https://sqs.eu-west-1.amazonaws.com/1/q"}, "sqs:// in place of https://"),
        ({"url": "redis://r", "results": "redis://r"}, "only for a queue in SQS"),
        ({"url": "sqs://host/1/q", "results": "http://r"}, "--results redis://"),
    ],
)
def test_urls_that_can_not_be_meant(table, words):
    with pytest.raises(ConfigError) as error:
        convert({"queue": table}, ServeConfig)
    assert words in str(error.value)


def test_a_server_refuses_to_start_with_a_queue_that_is_not_there(sqs, redis):
    """One line, exit code 2; nothing of the server is left."""
    options = ["--role", "web", "--queue", sqs.url("nothing"), "--results", redis.url]
    done = subprocess.run(
        [str(ROOT / "launch.sh"), "--port", str(free_port()), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "there is no queue" in line
    assert "Traceback" not in done.stderr
