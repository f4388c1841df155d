"""SQS for tests: moto's server, in a process of its own. Nothing leaves the machine."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanogpt.jobs.store import Lane
from nanogpt.network import free_port

START_S = 60  # a busy machine may take long; a test never waits for this when all is well
ACCOUNT = "123456789012"
REGION = "eu-west-1"
# moto takes any; without them boto3 would look for a role of the machine.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


class SqsServer:
    """Queues are made with `make`."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **CREDENTIALS},
        )
        self._numbers = itertools.count()

    def url(self, name: str) -> str:
        """As --queue takes it."""
        return f"sqs+http://127.0.0.1:{self.port}/{ACCOUNT}/{name}?region={REGION}"

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "sqs",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        client = self.client()
        while True:
            with contextlib.suppress(Exception):
                client.list_queues()
                break
            assert self.process.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)
        client.close()

    def make(self, name: str = "") -> str:
        """The three queues of a deployment, as new ones by default. Returns their URL."""
        name = name or f"q{next(self._numbers)}"
        client = self.client()
        for lane in Lane:
            client.create_queue(QueueName=f"{name}-{lane.name.lower()}")
        client.close()
        return self.url(name)

    def purge(self, url: str) -> None:
        """Every message is lost."""
        client = self.client()
        name = url.partition("?")[0].rpartition("/")[2]
        for lane in Lane:
            queue = f"http://127.0.0.1:{self.port}/{ACCOUNT}/{name}-{lane.name.lower()}"
            client.purge_queue(QueueUrl=queue)
        client.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def sqs_server() -> Iterator[SqsServer]:
    """One that runs. Skips the test without moto."""
    pytest.importorskip("moto.server")
    server = SqsServer()
    try:
        server.wait()
        yield server
    finally:
        server.close()
