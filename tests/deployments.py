"""The ways of deploying one and the same API: everything on one machine, or web server and cluster
in processes that share nothing but a queue."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import openai

from tests.redis_server import redis_server
from tests.server import READY_S, Server
from tests.sqs_server import CREDENTIALS, sqs_server

KINDS = ("local", "redis", "sqs")


class Deployment(NamedTuple):
    """What answers clients, and where the engines are: the same server on one machine."""

    web: Server
    cluster: Server

    def client(self, **settings) -> openai.OpenAI:
        return self.web.client(**settings)

    def running(self) -> int:
        """Choices that the engines are working on, from the metrics."""
        lines = httpx.get(f"{self.cluster.url}/metrics").text.splitlines()
        return int(sum(float(x.split()[-1]) for x in lines if x.startswith("nanogpt_running{")))


@contextlib.contextmanager
def split(kind: str, ranks: int = 1) -> Iterator[Deployment]:
    """A web server and a cluster with this kind of queue between them, ready."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-redis-"))
        redis = stack.enter_context(redis_server(Path(folder)))
        options, environ = ["--queue", redis.url], {}
        if kind == "sqs":
            sqs = stack.enter_context(sqs_server())
            options, environ = ["--queue", sqs.make(), "--results", redis.url], CREDENTIALS
        cluster = Server("--role", "worker", "--ranks", str(ranks), *options, environ=environ)
        stack.callback(cluster.close)
        web = Server("--role", "web", *options, environ={**environ, "NANOGPT_HTTP_WORKERS": "1"})
        stack.callback(web.close)
        for server in (web, cluster):
            server.wait_for("^ready: ")
        wait_for_cluster(web)
        yield Deployment(web, cluster)


def wait_for_cluster(web: Server) -> None:
    deadline = time.monotonic() + READY_S
    while httpx.get(f"{web.url}/ready").status_code != 200:
        assert time.monotonic() < deadline, f"no cluster was found: {web.output}"
        time.sleep(0.05)
