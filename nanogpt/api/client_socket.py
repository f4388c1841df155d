"""Has the client gone away? Asked of the socket, since reading and writing would not tell.

A write to a closed connection succeeds once, and someone who waits for an answer reads nothing;
POLLRDHUP shows the other side's FIN at once, even with unread bytes in front of it.
"""

import select
from collections.abc import Callable
from typing import Any


def watch(socket: Any) -> Callable[[], bool]:
    """A function that says whether the peer of this socket has closed; cheap enough for a loop.

    Without a socket (a server that hides it) the client is taken to be there.
    """
    try:
        descriptor = socket.fileno()
    except (AttributeError, OSError):
        return lambda: False
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    return lambda: bool(poll.poll(0))
