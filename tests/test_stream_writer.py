"""Streams that one thread writes: whole and in order to each client, whatever its pace."""

import contextlib
import socket
import threading
import time

import pytest

from nanogpt.api import listener, stream_writer
from nanogpt.api.errors import ClientGone
from nanogpt.api.stream_writer import StreamWriter
from nanogpt.bench.connection import _Chunked
from nanogpt.errors import ServerError, Unavailable

END = b"."


class FakeExchange:
    """Its events are pieces of text; the last one is END."""

    def __init__(self):
        self.assembler = self
        self.done = False
        self.error = None  # raised by look_around
        self.sink = None
        self.ready = threading.Event()

    def send_to(self, sink):
        self.sink = sink
        self.ready.set()

    def advance(self, events):
        if b"!" in events:
            raise ServerError("the engines gave up")
        self.done = events[-1] == END
        return events

    def patience(self):
        return 0.02

    def look_around(self):
        if self.error:
            raise self.error


class FakeStream:
    def chunks(self, deltas):
        return b"".join(deltas)

    def end(self, assembler):
        return b"END"


class Following:
    """A stream that is followed in a thread of its own."""

    def __init__(self, writer, **options):
        self.exchange, self.error = FakeExchange(), None
        self.client, self._peer = socket.socketpair()
        self.client.settimeout(10)
        for option, value in options.items():
            self._peer.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
        self._thread = threading.Thread(target=self._run, args=(writer,))
        self._thread.start()
        assert self.exchange.ready.wait(10)

    def _run(self, writer):
        try:
            writer.follow(self.exchange, self.exchange, FakeStream(), self._peer)
        except Exception as error:
            self.error = error
        self._peer.close()

    def put(self, *events):
        self.exchange.sink(list(events))

    def ended(self):
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error

    def received(self):
        """All that came, without the framing of its chunks."""
        chunked, text = _Chunked(), b""
        with contextlib.suppress(ConnectionResetError):
            while raw := self.client.recv(4096):
                text += chunked.feed(raw)
        assert chunked._buffer == b""
        assert chunked._left == 0, "a chunk is not complete"
        return text

    def close(self):
        self.exchange.error = ClientGone()
        self.client.close()
        self._thread.join(10)


@pytest.fixture
def writer():
    return StreamWriter()


@pytest.fixture
def follow(writer):
    made = []

    def start(**options):
        made.append(Following(writer, **options))
        return made[-1]

    yield start
    for following in made:
        following.close()


def test_each_client_gets_its_own_stream_in_order(follow):
    all_of_them = [follow() for _ in range(5)]
    for step in range(50):
        for number, one in enumerate(all_of_them):
            one.put(b"%d:%d " % (number, step))
    for number, one in enumerate(all_of_them):
        one.put(END)
        assert one.ended() is None
        expected = b"".join(b"%d:%d " % (number, step) for step in range(50))
        assert one.received() == expected + END + b"END"


def test_a_slow_client_gets_everything_and_holds_up_nobody(follow):
    slow, quick = follow(SO_SNDBUF=4096), follow()
    pieces = [b"%06d " % i * 20 for i in range(2000)]
    for piece in pieces:
        slow.put(piece)
    quick.put(b"hello", END)
    assert quick.ended() is None
    assert quick.received() == b"hello" + END + b"END"
    slow.put(END)
    assert slow.received() == b"".join(pieces) + END + b"END"
    assert slow.ended() is None


def test_what_comes_while_a_client_is_behind_goes_out_together(follow):
    one = follow(SO_SNDBUF=4096)
    one.put(b"x" * 200_000)
    for _ in range(1000):
        one.put(b"y")
    one.put(END)
    raw = b""
    while part := one.client.recv(65536):
        raw += part
    assert raw.count(b"\r\n") < 50


def test_an_error_ends_a_whole_chunk(follow):
    one = follow()
    one.put(b"so far")
    assert one.client.recv(100) == b"6\r\nso far\r\n"
    one.put(b"!")
    assert isinstance(one.ended(), ServerError)
    assert one.received() == b""


def test_an_error_comes_after_what_is_unsent(follow):
    """Else the event that tells of it would be inside another chunk."""
    one = follow(SO_SNDBUF=4096)
    one.put(b"z" * 300_000)
    one.exchange.error = Unavailable("draining")
    assert one.received() == b"z" * 300_000
    assert isinstance(one.ended(), Unavailable)


def test_a_client_that_left_is_noticed_when_writing(follow):
    one = follow()
    one.client.close()
    one.put(b"hello")
    assert isinstance(one.ended(), ClientGone)


def test_after_half_a_chunk_nothing_else_can_follow(follow):
    one = follow(SO_SNDBUF=4096)
    one.put(b"z" * 300_000)
    one.exchange.error = ClientGone()
    assert isinstance(one.ended(), ConnectionResetError)


def test_a_client_that_takes_nothing_is_given_up(follow, monkeypatch):
    monkeypatch.setattr(listener, "SEND_TIMEOUT_S", 0.1)
    one = follow(SO_SNDBUF=4096)
    one.put(b"z" * 300_000)
    assert isinstance(one.ended(), BlockingIOError)


def test_pings_while_nothing_comes(follow, monkeypatch):
    monkeypatch.setattr(stream_writer, "POLL_S", 0.03)
    one = follow()
    time.sleep(0.2)
    one.put(END)
    assert one.ended() is None
    text = one.received()
    assert text.startswith(b": ping\n\n")
    assert text.endswith(END + b"END")


def test_events_after_the_end_are_ignored(follow):
    one = follow()
    one.put(b"a", END)
    assert one.ended() is None
    one.put(b"late")
    assert one.received() == b"a" + END + b"END"
