"""One thread that writes all event streams, while the threads of their requests sleep.

A thread for each stream costs two wake-ups a token: measured at 512 streams of 20 tokens a second,
they were nine context switches and three quarters of the front end's time for each event. Here the
cluster's thread hands over what a step brought, and one thread turns it into text and sends it to
socket after socket, without ever waiting for one. Where a client is slower than its tokens, those
that came meanwhile go out together.
"""

import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from errno import ECONNRESET
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket

from nanogpt.api import listener
from nanogpt.api.backend import LiveHandle
from nanogpt.api.errors import ClientGone
from nanogpt.api.exchange import POLL_S, Exchange
from nanogpt.api.response import PING, Stream
from nanogpt.request import EngineEvent

log = logging.getLogger(__name__)

_SEND_FLAGS = int(MSG_DONTWAIT | MSG_NOSIGNAL)

MOST_EVENTS = 256  # put together for a client that is slower than its tokens


class StreamWriter:
    """Owns the thread. `put` is called by whoever has events, `follow` by a request's thread."""

    def __init__(self) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._queue: deque[tuple[_Outgoing, Sequence[EngineEvent]]] = deque()
        self._is_awake = False
        self._blocked: dict[int, _Outgoing] = {}  # by descriptor: whose socket is full
        self._thread = threading.Thread(target=self._run, name="stream-writer", daemon=True)
        self._thread.start()

    def follow(self, exchange: Exchange, handle: LiveHandle, stream: Stream, peer: socket) -> None:
        """Write the stream to its client, in chunks of HTTP/1.1, until its end.
        `handle` is where the exchange's events come from.

        Raises what Exchange.deltas does; BlockingIOError and ConnectionError when the connection
        is of no use for anything else.
        """
        outgoing = _Outgoing(self, exchange, stream, peer)
        try:
            handle.send_to(lambda events: self._put(outgoing, events))
            outgoing.wait()
        finally:
            outgoing.close()

    def _put(self, outgoing: "_Outgoing", events: Sequence[EngineEvent]) -> None:
        self._queue.append((outgoing, events))
        if not self._is_awake:
            self._is_awake = True
            os.eventfd_write(self._wake, 1)

    def watch(self, outgoing: "_Outgoing", descriptor: int) -> None:
        """Have it flushed as soon as its socket takes something."""
        self._blocked[descriptor] = outgoing
        self._poll.register(descriptor, select.EPOLLOUT)

    def unwatch(self, descriptor: int) -> None:
        if self._blocked.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    # The thread

    def _run(self) -> None:
        try:
            while True:
                self._turn(self._poll.poll())
        except BaseException:
            # Without this thread no stream would ever go on: end, so that the master notices.
            log.critical("the thread that writes streams failed", exc_info=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def _turn(self, ready: list[tuple[int, int]]) -> None:
        for descriptor, _ in ready:
            if descriptor == self._wake:
                os.eventfd_read(self._wake)
            elif (outgoing := self._blocked.get(descriptor)) is not None:
                outgoing.flush()
        self._is_awake = False  # whoever puts something from now on says so
        fresh: dict[_Outgoing, list[EngineEvent]] = {}
        while self._queue:
            outgoing, events = self._queue.popleft()
            fresh.setdefault(outgoing, []).extend(events)
        for outgoing, all_events in fresh.items():
            outgoing.take(all_events)


class _Outgoing:
    """One stream on its way. Its lock is held while anything of it changes or is sent."""

    def __init__(
        self, writer: StreamWriter, exchange: Exchange, stream: Stream, peer: socket
    ) -> None:
        self._writer, self._exchange, self._stream = writer, exchange, stream
        self._socket, self._descriptor = peer, peer.fileno()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._waiting: list[EngineEvent] = []  # while the socket is full
        self._unsent = b""
        self._complete = False  # the last event is sent, or unsent
        self._closed = False
        self._moved_at = time.monotonic()  # when the client last took something

    # The writer's thread

    def take(self, events: Sequence[EngineEvent]) -> None:
        with self._lock:
            self._waiting += events
            self._advance()

    def flush(self) -> None:
        with self._lock:
            if not self._closed:
                self._send()
                self._advance()

    def _advance(self) -> None:
        """Send what waits, until it is all gone or the socket is full."""
        while self._waiting and not (self._unsent or self._closed or self._ended.is_set()):
            events, self._waiting = self._waiting[:MOST_EVENTS], self._waiting[MOST_EVENTS:]
            try:
                text = self._stream.chunks(self._exchange.advance(events))
                if self._exchange.assembler.done:
                    text += self._stream.end(self._exchange.assembler)
                    self._complete = True
            except Exception as error:
                self._end(error)
                return
            if text:
                self._send(text)

    def _send(self, text: bytes = b"") -> None:
        """This after all that is unsent, as far as the socket takes it now."""
        unsent = self._unsent
        if text:
            unsent += b"%X\r\n%b\r\n" % (len(text), text)
        try:
            sent = self._socket.send(unsent, _SEND_FLAGS)
            self._moved_at = time.monotonic()
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end(ClientGone())
            return
        was_blocked, self._unsent = bool(self._unsent), unsent[sent:]
        if self._unsent and not was_blocked:
            self._writer.watch(self, self._descriptor)
        elif was_blocked and not self._unsent:
            self._writer.unwatch(self._descriptor)
        if self._complete and not self._unsent:
            self._ended.set()

    def _end(self, error: Exception) -> None:
        self._error = error
        self._ended.set()

    # The request's thread

    def wait(self) -> None:
        """Until the end. Raises what ended it before its time."""
        try:
            while not self._ended.wait(self._exchange.patience()):
                self._exchange.look_around()
                self._look_after()
            if self._error is not None:
                raise self._error
        except ClientGone:
            if self._unsent:  # half a chunk: nothing that follows could be understood
                raise ConnectionResetError(ECONNRESET, "the client left") from None
            raise
        except BlockingIOError:
            raise
        except Exception:
            self.close()
            self._socket.sendall(self._unsent)  # an event that tells of the error will follow
            raise

    def _look_after(self) -> None:
        """A second without an event is told; half a minute without room ends the stream."""
        with self._lock:
            idle_s = time.monotonic() - self._moved_at
            if self._ended.is_set():
                return
            if self._unsent and idle_s > listener.SEND_TIMEOUT_S:
                raise BlockingIOError("the client takes nothing any more")
            if not self._unsent and idle_s >= POLL_S:
                self._send(PING)

    def close(self) -> None:
        """The socket belongs to the request's thread alone again."""
        with self._lock:
            self._closed = True
            self._writer.unwatch(self._descriptor)
