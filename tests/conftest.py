"""What several test files use: real servers for the whole run."""

import contextlib
import os
from pathlib import Path

import pytest

from tests import deployments
from tests.deployments import Deployment
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


@pytest.fixture(scope="session")
def started_deployments():
    """Those that tests have used, by kind; they are kept for the next."""
    with contextlib.ExitStack() as stack:
        yield stack, {}


@pytest.fixture(params=deployments.KINDS)
def deployment(request, started_deployments):
    """The product, deployed in each of its ways: every test with it is run on all of them."""
    kind = request.param
    if kind == "local":
        server = request.getfixturevalue("server")
        return Deployment(server, server)
    stack, known = started_deployments
    if kind not in known:
        known[kind] = stack.enter_context(deployments.split(kind))
    return known[kind]


@pytest.fixture
def any_client(deployment):
    """The official client of a deployment, without retries."""
    with deployment.client() as client:
        yield client


@pytest.fixture(scope="module")
def one_thread():
    """For a module whose networks are tiny."""
    from tests.engine_utils import threads

    with threads(1):
        yield
