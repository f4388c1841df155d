"""Has the client gone away? Asked of the socket, since reading and writing would not tell.

A write to a closed connection succeeds once, and someone who waits for an answer reads nothing;
POLLRDHUP shows the other side's FIN at once, even with unread bytes in front of it.
"""

import select
from collections.abc import Callable
from socket import socket
from typing import NamedTuple


class Peer(NamedTuple):
    """The client's connection."""

    socket: socket
    is_chunked: bool  # an answer without a length goes out in chunks: HTTP/1.1


def watch(peer: Peer | None) -> Callable[[], bool]:
    """A function that says whether the peer has closed its side; cheap enough for a loop.

    Without one (a server that hides it) the client is taken to be there.
    """
    if peer is None:
        return lambda: False
    poll = select.poll()
    poll.register(peer.socket, select.POLLRDHUP)
    return lambda: bool(poll.poll(0))
