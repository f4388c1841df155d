"""HTTP/1.1 as a load generator needs it: one request, one connection, its bytes as they arrive.

A Protocol of asyncio without streams or a client library in between: a token costs its time stamp,
a search for line ends and one small JSON object, so that hundreds of streams don't need the cores
that the server is measured on.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import msgspec

from nanogpt.errors import ConfigError

OnLine = Callable[[bytes], None]


class ConnectionLost(Exception):
    """The server could not be reached, or left before its answer was complete."""


class Url(msgspec.Struct, frozen=True):
    """Where a server is. `path` is the prefix of the API, such as /v1."""

    host: str
    port: int
    path: str
    secure: bool

    @classmethod
    def parse(cls, text: str) -> "Url":
        """Raises ConfigError."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{text!r:.200} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{text!r:.200} is not a URL such as http://127.0.0.1:8000/v1")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/") or "/v1"
        return cls(parts.hostname, port or (443 if secure else 80), path, secure)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"

    @property
    def root(self) -> "Url":
        """The same server without the prefix, for /health and the like."""
        return msgspec.structs.replace(self, path="")


class Reply(msgspec.Struct):
    """A whole answer; `body` is empty when its lines went to a callback."""

    status: int
    body: bytes


class _Chunked:
    """Takes the framing of Transfer-Encoding: chunked away (RFC 9112, section 7.1)."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0  # of the present chunk, its CRLF included
        self.complete = False

    def feed(self, data: bytes) -> bytes:
        buffer, at, found = self._buffer + data, 0, []
        while at < len(buffer) and not self.complete:
            if self._left:
                end = min(at + self._left, len(buffer))
                found.append(buffer[at : min(end, at + max(0, self._left - 2))])
                self._left -= end - at
                at = end
                continue
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                break
            try:
                size = int(buffer[at:line_end].split(b";")[0], 16)
            except ValueError:
                raise ConnectionLost("the answer's chunks are malformed") from None
            at = line_end + 2
            self._left = size + 2 if size else 0
            self.complete = size == 0
        self._buffer = buffer[at:]
        return b"".join(found)


class _Plain:
    """A body of known length, or (None) one that ends with the connection."""

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.complete = length == 0

    def feed(self, data: bytes) -> bytes:
        if self._left is not None:
            self._left -= len(data)
            self.complete = self._left <= 0
        return data

    def closed(self) -> bool:
        return self._left is None


class _Exchange(asyncio.Protocol):
    """Sends the request once connected, and completes `reply` with the answer."""

    def __init__(self, request: bytes, on_line: OnLine | None) -> None:
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._request, self._on_line = request, on_line
        self._status = 0
        self._head = b""
        self._body: _Chunked | _Plain | None = None
        self._streams = False
        self._rest = b""  # a line that is not complete, or the body so far

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            if self._body is None:
                self._head += data
                head, found, data = self._head.partition(b"\r\n\r\n")
                if not found:
                    return
                self._read_head(head)
            assert self._body is not None
            self._take(self._body.feed(data))
            if self._body.complete:
                self._finish()
        except ConnectionLost as error:
            self._fail(str(error))

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        try:
            self._status = int(first.split(" ", 2)[1])
        except (IndexError, ValueError):
            raise ConnectionLost("the answer is not HTTP/1.1") from None
        fields = {k.strip().lower(): v.strip() for k, _, v in (n.partition(":") for n in lines)}
        if "chunked" in fields.get("transfer-encoding", "").lower():
            self._body = _Chunked()
        else:
            length = fields.get("content-length")
            self._body = _Plain(int(length) if length and length.isdigit() else None)
        is_events = fields.get("content-type", "").startswith("text/event-stream")
        self._streams = is_events and self._on_line is not None

    def _take(self, data: bytes) -> None:
        if not self._streams:
            self._rest += data
            return
        assert self._on_line is not None
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line:
                self._on_line(line.rstrip(b"\r"))

    def _finish(self) -> None:
        if not self.reply.done():
            self.reply.set_result(Reply(self._status, b"" if self._streams else self._rest))
        self._transport.close()

    def _fail(self, message: str) -> None:
        if not self.reply.done():
            self.reply.set_exception(ConnectionLost(message))
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(self._body, _Plain) and self._body.closed() and exc is None:
            self._finish()
        else:
            self._fail(f"the connection ended early{f': {exc}' if exc else ''}")

    def abandon(self) -> None:
        self._transport.abort()


async def request(
    url: Url,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    headers: Mapping[str, str],
    timeout_s: float,
    on_line: OnLine | None = None,
) -> Reply:
    """One request. Lines of an event stream go to `on_line` as they arrive.

    Raises ConnectionLost, also when the answer is not complete after `timeout_s`.
    """
    fields = {
        "Host": f"{url.host}:{url.port}",
        "Connection": "close",
        "Content-Length": str(len(body)),
        **({"Content-Type": "application/json"} if body else {}),
        **headers,
    }
    head = f"{method} {url.path}{path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in fields.items()
    )
    raw = head.encode("latin-1") + b"\r\n" + body
    context = ssl.create_default_context() if url.secure else None
    exchange: _Exchange | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, exchange = await asyncio.get_running_loop().create_connection(
                lambda: _Exchange(raw, on_line), url.host, url.port, ssl=context
            )
            return await exchange.reply
    except TimeoutError:
        raise ConnectionLost(f"no complete answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ConnectionLost(error.strerror or str(error)) from error
    finally:
        if exchange is not None:
            exchange.abandon()
