"""The front end's HTTP server: gunicorn with one worker of many threads (web servers have several).

The master keeps the listening socket when the worker dies. The application, with its cluster
client and threads, is made in the worker, since neither sockets of ZeroMQ nor threads survive a
fork.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.http import errors as malformed
from gunicorn.workers.gthread import TConn, ThreadWorker

from nanogpt.api import errors
from nanogpt.api.answer import JSON, new_request_id
from nanogpt.api.decode import clip
from nanogpt.api.listener import allow_files
from nanogpt.api.service import Service
from nanogpt.config import HttpConfig
from nanogpt.errors import ApiError

log = logging.getLogger(__name__)


class App(Protocol):
    """A WSGI application that keeps its Service under extensions["nanogpt"]."""

    extensions: dict[str, Any]

    def __call__(self, environ: Any, start_response: Any) -> Any: ...


KEEPALIVE_S = 75  # above the 60 s of common proxies, so that they close first
MAX_IDLE_CONNECTIONS = 2048  # beyond those that are served; they cost no thread
# All threads that wait for the interpreter lock wake up this often to ask for it. Ours hold it for
# microseconds between system calls, so asking is only work: at 512 streams of 20 events a second
# the default of 5 ms takes a third more CPU time, and falls behind where 20 ms keeps up.
SWITCH_INTERVAL_S = 0.02
GRACE_S = 3.0  # beyond drain_s, for the last answers to go out; the launcher waits 5
SPARE_FILES = 512  # for all that is not a connection
REQUEST_S = 60.0  # for a whole request to arrive, however steadily its bytes trickle in
PATIENCE_S = 2.0  # with a request that has not arrived, when others wait for its thread
WARN_EVERY_S = 60.0  # at most: clients must not fill the log
LINGER_S = 2.0  # for a client to read the last answer before its connection is closed
LINGER_BYTES = 65536


class _Logger(glogging.Logger):
    """Leaves gunicorn's messages to the handlers of this process."""

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(sys.exc_info()[1], BlockingIOError):  # one of the two timeouts
            log.info("closed the connection of a client that stalled")
        else:
            super().exception(msg, *args, **kwargs)

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class _Connection(socket.socket):
    """Receives until a given time: a timeout of each `recv` alone never ends a slow drip."""

    receive_until = math.inf  # time.monotonic()
    is_receiving = False  # a thread waits for the client's bytes

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if time.monotonic() > self.receive_until:
            raise BlockingIOError("the request did not arrive in time")
        self.is_receiving = True
        try:
            return super().recv(size, flags)
        finally:
            self.is_receiving = False

    def linger(self) -> None:
        """Say that no more will come, and let the other side close first: closing with unread
        bytes would reset the connection, and the client may lose the end of its answer.
        """
        self.receive_until = time.monotonic() + LINGER_S
        received = 0
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_WR)
            self.settimeout(LINGER_S)
            while received < LINGER_BYTES and (piece := self.recv(4096)):
                received += len(piece)
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)


def allow_time(connection: object, seconds: float) -> None:
    """Give a client so much longer to send its request. For the socket of a connection here."""
    if isinstance(connection, _Connection):
        connection.receive_until += seconds


class Worker(ThreadWorker):
    """Drains on SIGTERM, and answers in JSON when a request is not even HTTP.

    gunicorn would close the listening socket at once, and whoever comes meanwhile would not be
    told why. This one goes on as before until those who were accepted have their answers: what
    comes new is refused by the service.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # Connections that wait for a thread, and those that have one: since when.
        self._queued: set[TConn] = set()
        self._handled: dict[TConn, float] = {}
        self._warn_at = -math.inf
        self._draining = False

    def enqueue_req(self, conn: TConn) -> None:
        if not isinstance(conn.sock, _Connection):
            conn.sock = _Connection(fileno=conn.sock.detach())
        self._queued.add(conn)
        super().enqueue_req(conn)

    def murder_pending(self) -> None:
        """gunicorn's main thread calls this after each event, and every second."""
        super().murder_pending()
        if self._draining and self.alive and self.app.service.is_drained():
            super().handle_exit(signal.SIGTERM, None)
        if self._queued:
            self._make_room(len(self._queued))

    def _make_room(self, wanted: int) -> None:
        """A few hundred clients that send a byte now and then had all threads, and /health failed:
        those that keep theirs waiting longest go when others need one.
        """
        before = time.monotonic() - PATIENCE_S
        slow = [c for c, since in list(self._handled.items()) if since < before]
        idle = [conn for conn in slow if conn.sock.is_receiving][:wanted]
        for conn in idle:
            with contextlib.suppress(OSError):  # it may have ended by itself
                conn.sock.shutdown(socket.SHUT_RDWR)
        if idle and time.monotonic() > self._warn_at:
            self._warn_at = time.monotonic() + WARN_EVERY_S
            log.warning("closing connections of slow clients: others need their threads")

    def handle(self, conn: TConn) -> Any:
        """One request. Lingering is done here: gunicorn's main thread would accept nobody else
        for two seconds, for each client that leaves its end open.
        """
        self._queued.discard(conn)
        self._handled[conn] = now = time.monotonic()
        conn.sock.receive_until = now + REQUEST_S
        try:
            kept = super().handle(conn)
            if kept is False:
                conn.sock.linger()
            return kept
        finally:
            del self._handled[conn]

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._draining or self.app.service is None:
            super().handle_exit(sig, frame)
        else:
            self._drain()

    def is_parent_alive(self) -> bool:
        """Without its master this worker makes room for another pair, but not before it drained."""
        if not self._draining and not super().is_parent_alive():
            self._drain()
        return True

    def _drain(self) -> None:
        self._draining = True
        self.app.service.drain()
        self.method_queue.defer(lambda: None)  # wakes up the main thread, should it be idle

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        error = malformed_request(exc) or errors.unexpected(exc)
        body = errors.body(error)
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            f"x-request-id: {new_request_id()}\r\nopenai-processing-ms: 0\r\n\r\n"
        )
        log.info("malformed request from %s: %s", addr[0] if addr else "-", exc)
        with contextlib.suppress(OSError):  # the client may be gone, and that is all right
            client.settimeout(1.0)
            client.sendall(head.encode("latin-1") + body)


def malformed_request(exc: Exception) -> ApiError | None:
    """The answer when `exc` says that head or body of a request is not HTTP; else None."""
    ours = (malformed.InvalidResponseHeader, malformed.InvalidResponseHeaderName)
    if not isinstance(exc, malformed.ParseException) or isinstance(exc, ours):
        return None
    text = f"the request is not valid HTTP/1.1: {clip(str(exc))}"
    return errors.from_status(_PARSE_STATUS.get(type(exc), 400), text)


_PARSE_STATUS = {
    malformed.LimitRequestLine: 414,
    malformed.LimitRequestHeaders: 431,
    malformed.UnsupportedTransferCoding: 501,
    malformed.ExpectationFailed: 417,
}


class _Application(BaseApplication):
    """gunicorn with our settings; the worker makes the application."""

    def __init__(
        self,
        listener: socket.socket,
        make_app: Callable[[], App],
        settings: HttpConfig,
        workers: int,
    ) -> None:
        self._listener, self._make_app, self._settings = listener, make_app, settings
        self._workers = workers
        self.service: Service | None = None
        super().__init__()

    def load_config(self) -> None:
        threads = self._settings.threads
        connections = allow_files(threads + MAX_IDLE_CONNECTIONS + SPARE_FILES) - SPARE_FILES
        values = {
            "bind": f"fd://{self._listener.detach()}",
            "worker_class": Worker,
            "workers": self._workers,
            "threads": threads,
            "worker_connections": max(connections, threads),
            "keepalive": KEEPALIVE_S,
            "timeout": 60,  # of silence of the worker's main thread
            "graceful_timeout": math.ceil(self._settings.drain_s + GRACE_S),
            "limit_request_line": 8190,
            "limit_request_fields": 100,
            "limit_request_field_size": 16384,
            "forwarded_allow_ips": "",  # no peer may say that it speaks for another
            "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
            "logger_class": _Logger,
            "loglevel": "warning",
            "control_socket_disable": True,
            "proc_name": "nanogpt-frontend",
            "worker_exit": lambda server, worker: self._close(),
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> App:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        app = self._make_app()
        self.service = app.extensions["nanogpt"]
        return app

    def _close(self) -> None:
        if self.service is not None:
            self.service.close()


def serve(
    listener: socket.socket, make_app: Callable[[], App], settings: HttpConfig, workers: int = 1
) -> None:
    """Answer on this socket until SIGTERM. `make_app` is called in each worker process."""
    _Application(listener, make_app, settings, workers).run()
