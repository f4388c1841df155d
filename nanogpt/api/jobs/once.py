"""Idempotency-Key: a repeat of a POST stands for the first one."""

import hashlib
import re

from nanogpt.api.caller import Caller
from nanogpt.errors import Conflict, InvalidRequest
from nanogpt.jobs.store import Job

HEADER = "Idempotency-Key"
_SANE = re.compile(r"[!-~]{1,255}")


def name(caller: Caller, key: str | None) -> str:
    """What the store knows the request by; "" without the header. Raises InvalidRequest."""
    if key is None:
        return ""
    if not _SANE.fullmatch(key):
        raise InvalidRequest(
            f"{HEADER} must be 1 to 255 ASCII characters, none of them a space: a new random one "
            "for each request, and the same for its repeats",
            param=HEADER,
        )
    return hashlib.sha256(f"{caller.name}\0{key}".encode()).hexdigest()


def refuse(path: str, key: str | None) -> None:
    """For a POST that doesn't take a key. Raises InvalidRequest for one: nobody may believe that
    it was heeded."""
    if key is not None:
        raise InvalidRequest(
            f"{HEADER} is not taken by {path[:100]}, which may be repeated as it is; leave the "
            "header out",
            param=HEADER,
        )


def digest(route: str, *parts: bytes) -> bytes:
    """Of what is asked for. The route is part of it."""
    found = hashlib.sha256(route.encode())
    for part in parts:
        found.update(len(part).to_bytes(8, "big"))
        found.update(part)
    return found.digest()


def check(job: Job, digest: bytes) -> None:
    """Raises Conflict when the job was made by another request under the same name."""
    if job.digest != digest:
        raise Conflict(
            f"this {HEADER} was used for another request in the last 24 hours; "
            "use a new one for each request",
            param=HEADER,
        )
