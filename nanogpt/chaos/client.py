"""A client that writes down all that it sees of one request."""

import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanogpt.chaos.history import Asked, Behaviour, Chunk, Outcome
from nanogpt.chaos.load import streamed

PATIENCE_S = 180.0  # without a byte; a stream is pinged each second
DAWDLE_S, DAWDLE_TIMES = 0.15, 30  # a slow reader's pause after each event, and how many it makes
SMALL_BUFFER = 4096  # bytes that a slow reader lets the kernel hold for it


class _Seen:
    """What has come so far."""

    def __init__(self) -> None:
        self.status = 0
        self.retry_after: str | None = None
        self.chunks: list[Chunk] = []


def ask(
    port: int,
    number: int,
    template: int,
    body: dict[str, Any],
    *,
    stream: bool,
    behaviour: Behaviour = "reads",
    on_tokens: Callable[[], None] = lambda: None,
) -> Asked:
    """Send a request and follow it to its end, whatever that is. Never raises for what the server
    or the network does. `on_tokens` is called whenever some have come."""
    seen, error, sent = _Seen(), "", time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    outcome: Outcome
    try:
        connection.connect()
        if behaviour == "dawdles":
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        payload = json.dumps(streamed(body) if stream else body)
        connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        seen.status, seen.retry_after = response.status, response.getheader("Retry-After")
        outcome = _follow(response, seen, stream, behaviour, number, on_tokens)
    except TimeoutError:
        outcome, error = "timeout", f"nothing for {PATIENCE_S:.0f} s"
    except (OSError, http.client.HTTPException) as problem:
        outcome, error = "broken" if seen.status else "unreachable", repr(problem)
    finally:
        connection.close()
    return Asked(
        number=number,
        template=template,
        stream=stream,
        behaviour=behaviour,
        sent=sent,
        ended=time.monotonic(),
        outcome=outcome,
        status=seen.status,
        retry_after=seen.retry_after,
        chunks=seen.chunks,
        error=error,
    )


def _follow(
    response: http.client.HTTPResponse,
    seen: _Seen,
    stream: bool,
    behaviour: Behaviour,
    number: int,
    on_tokens: Callable[[], None],
) -> Outcome:
    if response.status != 200 or not stream:
        seen.chunks.append(Chunk(time.monotonic(), response.read().decode()))
        if response.status == 200:
            on_tokens()
            return "complete"
        return "refused" if response.status in (429, 503) else "failed"
    leave_after = random.Random(number).randint(0, 40) if behaviour == "leaves" else None
    for data in _events(response):
        if data == "[DONE]":
            return "complete"
        seen.chunks.append(Chunk(time.monotonic(), data))
        if data.startswith('{"error"'):
            return "failed"
        on_tokens()
        if leave_after is not None and len(seen.chunks) > leave_after:
            return "left"
        if behaviour == "dawdles" and len(seen.chunks) <= DAWDLE_TIMES:
            time.sleep(DAWDLE_S)
    raise http.client.IncompleteRead(b"")


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each event; comments are left out."""
    for line in response:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()
