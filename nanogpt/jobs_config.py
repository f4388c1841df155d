"""The tables [jobs] and [queue] of the configuration file: stored completions, files and batches,
and what web servers and clusters on different machines share."""

import os
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from nanogpt.errors import ConfigError
from nanogpt.section import Section


class QueueConfig(Section, frozen=True, kw_only=True):
    """Where web servers leave work for clusters; they must name the same."""

    url: str = ""  # redis://HOST:PORT/DB, or rediss:// with TLS; empty: none, one machine
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "nanogpt"  # in its keys

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("redis://", "rediss://", "unix://")):
            # The URL may hold a password, so it is not repeated.
            raise ValueError("queue.url must be redis://HOST:PORT/DB (or rediss://, unix://PATH)")


class JobsConfig(Section, frozen=True, kw_only=True):
    """Where accepted work is kept, how long, and how much of it."""

    path: str = ""  # directory; empty: below ~/.local/state, one for each port
    keep_hours: Annotated[float, Meta(ge=0.001, le=87_600)] = 720.0  # after the end, and files
    max_queued: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000  # unfinished completions, batches
    max_running: Annotated[int, Meta(ge=1, le=4096)] = 256  # choices in the background at once
    max_file_mb: Annotated[int, Meta(ge=1, le=4096)] = 200
    max_store_mb: Annotated[int, Meta(ge=16, le=10_000_000)] = 20_000  # of all that is kept

    def directory(self, port: int) -> Path:
        """Where the server on this port keeps its jobs. Raises ConfigError."""
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        try:
            return Path(self.path or f"{base}/nanogpt/jobs-{port}").expanduser().absolute()
        except RuntimeError as error:  # no HOME, and no such user in the password file
            raise ConfigError(
                f"can't tell where to keep jobs: {error}; set jobs.path to a directory"
            ) from error
