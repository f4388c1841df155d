"""The listening socket, and what the operating system must allow for many connections."""

import logging
import resource
import socket
import struct

from nanogpt.errors import StartupError

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted

# A thread reads a request and writes its answer, so a client that stalls must not keep it. A
# kept-alive connection between requests has no thread, and who waits for tokens sends nothing.
RECEIVE_TIMEOUT_S = 20.0  # without a byte of a request that has begun
SEND_TIMEOUT_S = 30.0  # without room for a byte of the answer, socket buffers being full


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartupError when the address can't be had.

    Its connections inherit the timeouts: recv and send on them raise BlockingIOError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise StartupError(
            f"can't listen on {host}:{port}: {error.strerror}; choose another with --port"
        ) from error
    for option, seconds in (
        (socket.SO_RCVTIMEO, RECEIVE_TIMEOUT_S),
        (socket.SO_SNDTIMEO, SEND_TIMEOUT_S),
    ):
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        listener.setsockopt(socket.SOL_SOCKET, option, timeval)
    return listener


def allow_files(wanted: int) -> int:
    """Have this process and its children open so many files, or as many as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        log.warning("only %d files may be open, %d would be good: see ulimit -Hn", hard, wanted)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
