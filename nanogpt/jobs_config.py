"""The tables [jobs] and [queue] of the configuration file: stored completions, files and batches,
and what web servers and clusters on different machines share."""

import os
import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from nanogpt.errors import ConfigError
from nanogpt.section import Section

_REDIS = ("redis://", "rediss://", "unix://")
# An account is 12 digits at Amazon; stand-ins have others. Lanes add up to 11 characters to a name
# of at most 80.
SQS_URL = re.compile(
    r"sqs(?P<plain>\+http)?://(?P<host>[A-Za-z0-9.-]+(:\d+)?)/(?P<account>[A-Za-z0-9-]+)/"
    r"(?P<name>[A-Za-z0-9_-]{1,69})(\?region=(?P<region>[a-z0-9-]+))?"
)


class QueueConfig(Section, frozen=True, kw_only=True):
    """Where web servers leave work for clusters; they must name the same."""

    url: str = ""  # redis://HOST:PORT/DB, or rediss:// with TLS; empty: none, one machine
    # With sqs://HOST/ACCOUNT/NAME in url: the redis:// where jobs and their results are kept.
    results: str = ""
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "nanogpt"  # in its keys

    def __post_init__(self) -> None:
        # URLs may hold a password, so they are not repeated.
        if self.is_sqs:
            self._check_sqs()
        elif self.url and not self.url.startswith(_REDIS):
            hint = "; write sqs:// in place of https://" if "sqs" in self.url else ""
            raise ValueError(
                "queue.url must be redis://HOST:PORT/DB (or rediss://, unix://PATH), or "
                f"sqs://HOST/ACCOUNT/NAME{hint}"
            )
        elif self.results:
            raise ValueError("queue.results is only for a queue in SQS; Redis keeps them itself")

    def _check_sqs(self) -> None:
        if "@" in self.url:
            raise ValueError(
                "queue.url must not hold credentials: boto3 finds them in the environment, in "
                "~/.aws, or in the role of the machine"
            )
        if self.url.partition("?")[0].endswith(".fifo"):
            raise ValueError("queue.url must name standard queues: FIFO ones hold up other jobs")
        if not SQS_URL.fullmatch(self.url):
            raise ValueError(
                "queue.url must be sqs://HOST/ACCOUNT/NAME, such as "
                "sqs://sqs.eu-west-1.amazonaws.com/123456789012/completions, with ?region=REGION "
                "where the host does not tell it (sqs+http:// is without TLS)"
            )
        if not self.results.startswith(_REDIS):
            raise ValueError(
                "a queue in SQS needs a Redis that keeps jobs and results: "
                "--results redis://HOST:PORT/DB"
            )

    @property
    def is_sqs(self) -> bool:
        return self.url.startswith(("sqs:", "sqs+http:"))

    @property
    def redis_url(self) -> str:
        """Of the Redis that web servers and clusters share; empty on one machine."""
        return self.results if self.is_sqs else self.url


class JobsConfig(Section, frozen=True, kw_only=True):
    """Where accepted work is kept, how long, and how much of it."""

    path: str = ""  # directory; empty: below ~/.local/state, one for each port
    keep_hours: Annotated[float, Meta(ge=0.001, le=87_600)] = 720.0  # after the end, and files
    max_queued: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000  # unfinished completions, batches
    max_running: Annotated[int, Meta(ge=1, le=4096)] = 256  # choices in the background at once
    # Of batches; 0: a quarter more than all ranks run, so that one that ends has a successor.
    max_batch_choices: Annotated[int, Meta(ge=0, le=65536)] = 0
    max_file_mb: Annotated[int, Meta(ge=1, le=4096)] = 200
    max_store_mb: Annotated[int, Meta(ge=16, le=10_000_000)] = 20_000  # of all that is kept

    def batch_choices(self, running: int) -> int:
        """How many are at the engines at once, of which so many run."""
        return self.max_batch_choices or running + max(1, running // 4)

    def directory(self, port: int) -> Path:
        """Where the server on this port keeps its jobs. Raises ConfigError."""
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        try:
            return Path(self.path or f"{base}/nanogpt/jobs-{port}").expanduser().absolute()
        except RuntimeError as error:  # no HOME, and no such user in the password file
            raise ConfigError(
                f"can't tell where to keep jobs: {error}; set jobs.path to a directory"
            ) from error
