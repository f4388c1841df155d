"""What a route gives back, before any web framework makes a response of it."""

import secrets
from collections.abc import Iterator
from typing import NamedTuple, Protocol

JSON = "application/json"
EVENT_STREAM = "text/event-stream; charset=utf-8"


class Ongoing(Protocol):
    """What an answer is made from while it is sent."""

    def close(self) -> None:
        """May be called again."""

    def summary(self) -> str:
        """For the log."""


class Answer(NamedTuple):
    body: bytes | Iterator[bytes]
    status: int = 200
    content_type: str = JSON
    headers: dict[str, str] = {}
    exchange: Ongoing | None = None  # to be closed when the body has been sent, or can't be


def new_request_id() -> str:
    """For an answer whose client gave no sane x-request-id."""
    return f"req_{secrets.token_hex(16)}"
