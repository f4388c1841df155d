"""The way to Redis: scripts and commands that fail within seconds, and say whether they may have
been carried out all the same."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from nanogpt.errors import ConfigError
from nanogpt.jobs.store import StoreUnavailable

log = logging.getLogger(__name__)

CONNECT_S = 2.0
ANSWER_S = 5.0  # beyond what a command itself waits
MAX_CONNECTIONS = 10_000  # as many threads as a web server may have, and more


class MaybeDone(StoreUnavailable):
    """The connection broke after the command had been sent."""


class Link:
    """Thread-safe; a connection for each thread that needs one at the time. Does not connect yet.
    Raises ConfigError for a URL that can't be one of Redis, or without the package."""

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("queue.url needs the package redis: pip install redis") from error
        try:
            self._pool = redis.ConnectionPool.from_url(
                url,
                socket_timeout=ANSWER_S,
                socket_connect_timeout=CONNECT_S,
                retry=Retry(NoBackoff(), 0),
                max_connections=MAX_CONNECTIONS,
            )
        except ValueError as error:  # the URL may hold a password, so it is not repeated
            raise ConfigError("queue.url must be redis://HOST:PORT/DB, or rediss://…") from error
        self._error = redis.RedisError
        self._missing = redis.exceptions.NoScriptError
        self._broken = (redis.ConnectionError, redis.TimeoutError, OSError)

    def close(self) -> None:
        self._pool.disconnect()

    def script(self, text: str, key: str, arguments: Sequence[bytes | str | int | float]) -> Any:
        """What the script answers, as bytes, integers and lists."""
        digest = hashlib.sha1(text.encode()).hexdigest()
        (answer,) = self.commands(("EVALSHA", digest, 1, key, *arguments))
        if isinstance(answer, self._missing):
            (answer,) = self.commands(("EVAL", text, 1, key, *arguments))
        return _checked(answer)

    def command(self, *words: bytes | str | int | float) -> Any:
        return self.each(words)[0]

    def each(self, *commands: Sequence[bytes | str | int | float]) -> list[Any]:
        """The answers. Raises StoreUnavailable for an error among them; the other commands were
        carried out then."""
        return [_checked(answer) for answer in self.commands(*commands)]

    def commands(self, *commands: Sequence[bytes | str | int | float]) -> list[Any]:
        """The answers, of which some may be errors. Raises StoreUnavailable when nothing was done,
        MaybeDone when that is not known."""
        try:
            connection = self._pool.get_connection()
        except self._error as error:
            raise _unavailable(error) from error
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [self._answer(connection) for _ in commands]
        except self._broken as error:
            connection.disconnect()
            raise MaybeDone(f"the queue does not answer ({error})", retry_after=5) from error
        except BaseException:  # an answer may still be on its way
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def _answer(self, connection: Any) -> Any:
        try:
            return connection.read_response()
        except self._broken:
            raise
        except self._error as error:
            return error


def pairs(flat: Any) -> list[tuple[str, bytes]]:
    """Of a hash, as either version of the protocol gives it."""
    found = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    return [(text(name), value) for name, value in found]


def text(word: Any) -> Any:
    """A word of an answer."""
    return word.decode() if isinstance(word, bytes) else word


def _checked(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise _unavailable(answer) from answer
    return answer


def _unavailable(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(
        f"the queue can't be used now ({error}): nothing was accepted; try again later",
        retry_after=5,
    )
