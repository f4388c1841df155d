"""A real redis-server for tests: its own directory and port, every write on the disk at once."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from nanogpt.network import free_port

START_S = 60  # a busy machine may take long; a test never waits for this when all is well


class RedisServer:
    """Started by `start`, also again after `kill`, with what it has on its disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                "redis-server",
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory)),
                *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            ],
            stdout=subprocess.DEVNULL,
        )
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(redis.ConnectionError):  # also while it loads
                client.ping()
                break
            assert self.process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)
        client.close()

    def kill(self) -> None:
        """As a loss of power of its machine would, but for the disk's own cache."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[RedisServer]:
    """One that runs. Skips the test where there is none installed."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (on Debian: apt install redis-server)")
    directory.mkdir(exist_ok=True)
    server = RedisServer(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
