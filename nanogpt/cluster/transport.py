"""ZeroMQ sockets: the only file that knows them.

Each socket belongs to the thread that made it. Nothing blocks on a send: what the peer can't take
yet waits in an outbox of ours, so nothing is ever dropped for a full queue.

Between processes of one machine the endpoints are ipc in a private directory. Between machines
they are tcp with CURVE: the server accepts one client key, made afresh at each start and handed to
the ranks through the front end's Welcome.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import zmq
import zmq.auth.thread

from nanogpt.cluster.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    Decoder,
    FromRank,
    FromRankZero,
    Hello,
    Message,
    ToRankZero,
    Welcome,
    encode,
)

LINGER_MS = 200  # at close: what a peer that is still there may yet take
MANY = 100_000  # messages in a socket's own queue before our outbox holds the rest


class CurveKeys(NamedTuple):
    """Z85 text. The client pair is shared by all ranks of a cluster."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair(), *zmq.curve_keypair())


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, MANY)
    socket.setsockopt(zmq.RCVHWM, MANY)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


def _received(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """All the messages that are there now."""
    while True:
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


class _Outbox:
    """Messages on their way to one socket, in order."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._waiting: deque[list[bytes]] = deque()
        self.sent = 0  # messages that the socket has taken

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, *parts: bytes) -> None:
        self._waiting.append(list(parts))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes. A peer that is gone takes nothing ever again."""
        while self._waiting:
            try:
                self._socket.send_multipart(self._waiting[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
            self._waiting.popleft()
            self.sent += 1


class FrontEndSockets:
    """The front end's side: a ROUTER towards rank 0 and a PULL for every rank's events.

    With `remote_host` (more than one node) events come over tcp as well, on a free port.
    """

    def __init__(self, control: str, events: str, remote_host: str = "") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = _socket(self._context, zmq.ROUTER)
        self._control.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._control.bind(control)
        self._outbox = _Outbox(self._control)
        self._events = _socket(self._context, zmq.PULL)
        self._local_events = events
        self._events.bind(events)
        self._poller = zmq.Poller()
        self._poller.register(self._control, zmq.POLLIN)
        self._poller.register(self._events, zmq.POLLIN)
        self._decode_control: Decoder[FromRankZero] = Decoder(FromRankZero)
        self._decode_event: Decoder[FromRank] = Decoder(FromRank)
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        self._remote: zmq.Socket[bytes] | None = None
        self._keys: CurveKeys | None = None
        if remote_host:
            self._open_remote(remote_host)

    def _open_remote(self, host: str) -> None:
        keys = self._keys = CurveKeys.generate()
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()

        class OneClient:
            def callback(self, domain: str, key: bytes) -> bool:  # key: Z85
                return key == keys.client_public

        self._authenticator.configure_curve_callback(domain="*", credentials_provider=OneClient())
        self._remote = _socket(self._context, zmq.PULL)
        self._remote.setsockopt(zmq.CURVE_SERVER, 1)
        self._remote.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret)
        self._remote.setsockopt(zmq.CURVE_PUBLICKEY, keys.server_public)
        self._remote.setsockopt(zmq.IPV6, 1 if ":" in host else 0)
        self._remote.bind(f"tcp://{f'[{host}]' if ':' in host else host}:0")
        self._poller.register(self._remote, zmq.POLLIN)

    def welcome(self, epoch: int) -> Welcome:
        """Where the ranks of this epoch send their events."""
        if self._remote is None or self._keys is None:
            return Welcome(epoch, self._local_events)
        return Welcome(
            epoch,
            self._local_events,
            self._remote.getsockopt_string(zmq.LAST_ENDPOINT),
            self._keys.server_public.decode(),
            self._keys.client_public.decode(),
            self._keys.client_secret.decode(),
        )

    def watch(self, fd: int) -> None:
        """Let `poll` return when this file descriptor becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)

    def poll(self, timeout_ms: int) -> set[int]:
        """Wait; returns the watched file descriptors that are readable."""
        self._outbox.flush()
        wait = min(timeout_ms, 5) if self._outbox else timeout_ms
        return {s for s, _ in self._poller.poll(wait) if isinstance(s, int)}

    def send(self, identity: bytes, message: Message) -> None:
        """To rank 0. Its messages keep their order; dropped only if that process is gone."""
        self._outbox.put(identity, encode(message))

    def control_messages(self) -> Iterator[tuple[bytes, FromRankZero]]:
        """(identity of the sender, message); raises ProtocolError."""
        for identity, *parts in _received(self._control):
            yield identity, self._decode_control(b"".join(parts))

    def event_messages(self) -> Iterator[FromRank]:
        """From every rank; raises ProtocolError."""
        for socket in filter(None, (self._events, self._remote)):
            for parts in _received(socket):
                yield self._decode_event(b"".join(parts))

    def close(self) -> None:
        if self._authenticator:
            self._authenticator.stop()
        self._context.destroy(linger=LINGER_MS)


class ControlLink:
    """Rank 0's side of the control channel."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER)
        self._socket.connect(endpoint)
        self._outbox = _Outbox(self._socket)
        self._decode: Decoder[ToRankZero] = Decoder(ToRankZero)

    def send(self, message: Hello | Alive) -> None:
        self._outbox.put(encode(message))

    def receive(self, timeout_ms: int = 0) -> list[ToRankZero]:
        """What is there, after waiting up to `timeout_ms` for something. Raises ProtocolError."""
        self._outbox.flush()
        if timeout_ms and not self._socket.poll(timeout_ms):
            return []
        return [self._decode(b"".join(parts)) for parts in _received(self._socket)]

    def close(self) -> None:
        self._context.destroy(linger=LINGER_MS)


class EventLink:
    """A rank's PUSH to the front end: one thread's own."""

    def __init__(self, welcome: Welcome, is_local: bool) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _socket(self._context, zmq.PUSH)
        if not is_local:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, welcome.server_key.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, welcome.client_public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, welcome.client_secret.encode())
        self._socket.connect(welcome.local_events if is_local else welcome.remote_events)
        self._outbox = _Outbox(self._socket)

    @property
    def backlog(self) -> int:
        """Messages that the socket would not take yet."""
        return len(self._outbox)

    @property
    def sent(self) -> int:
        """Messages that the socket has taken. Any thread may ask."""
        return self._outbox.sent

    def send(self, message: FromRank) -> None:
        self._outbox.put(encode(message))

    def flush(self) -> None:
        self._outbox.flush()

    def close(self) -> None:
        self._context.destroy(linger=LINGER_MS)
