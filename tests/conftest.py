"""What several test files use: one real server of two ranks for the whole run."""

import os
from pathlib import Path

import pytest

from tests.server import serving

# Where there is no GPU, Triton is an interpreter; it looks here when anybody first imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def server():
    """The real launch.sh with two ranks and the bundled model, ready."""
    with serving("--ranks", "2") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """The official client, without retries."""
    with server.client() as client:
        yield client
