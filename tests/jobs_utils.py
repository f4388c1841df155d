"""The application with stored jobs, on a fake cluster."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flask

from nanogpt.jobs.sqlite import open_store
from nanogpt.jobs_config import JobsConfig
from tests.app_utils import make_app
from tests.fake_cluster import FakeCluster

WAIT_S = 60  # a busy machine may take long; a test never waits for this when all is well


@contextlib.contextmanager
def jobs_app(
    directory: Path,
    cluster: FakeCluster | None = None,
    config: JobsConfig | None = None,
    **more: Any,
) -> Iterator[flask.Flask]:
    """Closed at the end, as a server that is told to stop. It looks around more often than a real
    one."""
    config = config or JobsConfig()
    jobs = (open_store(config, directory), directory, config)
    app = make_app(cluster or FakeCluster(), jobs=jobs, **{"clock": time.time, **more})
    with (
        patch("nanogpt.jobs.runner.CLAIM_S", 0.02),
        patch("nanogpt.api.jobs.batch_feed.LOOK_S", 0.05),
        contextlib.closing(app.extensions["nanogpt"]),
    ):
        yield app


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition gives, once it is true."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return found


class Others:
    """What the clusters of a queue tell: whether another one has `model`."""

    def __init__(self, model: str) -> None:
        self.model, self.offer, self.asked = model, True, 0

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def is_offered(self, model: str) -> bool:
        assert model == self.model
        self.asked += 1
        return self.offer
