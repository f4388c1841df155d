"""What several test files use: one real server of two ranks for the whole run."""

import pytest

from tests.server import serving


@pytest.fixture(scope="session")
def server():
    """The real launch.sh with two ranks and the bundled model, ready."""
    with serving("--ranks", "2") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """The official client, without retries."""
    return server.client()
