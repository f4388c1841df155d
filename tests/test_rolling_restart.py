"""Two servers behind the nginx of configs/deploy are restarted one after the other, under load."""

import concurrent.futures
import contextlib
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from nanogpt.network import free_port
from tests.server import ROOT, Server
from tests.test_e2e import complete, wait_until

CONFIGURATION = ROOT / "configs" / "deploy" / "nginx.conf"
CLIENTS = 6
BODIES = [{"n": n, "seed": seed, "max_tokens": 20 + 20 * n} for n in (1, 2) for seed in range(3)]

pytestmark = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def proxy(directory: Path, ports: list[int]) -> Iterator[int]:
    """nginx with the configuration that we give to operators, but for the ports."""
    own = free_port()
    text = CONFIGURATION.read_text()
    for example, port in zip((8001, 8002, 8000), (*ports, own), strict=True):
        assert str(example) in text
        text = text.replace(f":{example} ", f":{port} ").replace(f" {example};", f" {port};")
    (directory / "server.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in kinds)
    main = directory / "nginx.conf"
    main.write_text(
        f"daemon off;\npid {directory}/pid;\nerror_log stderr error;\nworker_processes 1;\n"
        f"events {{}}\nhttp {{\naccess_log {directory}/access.log;\n{paths}"
        f"include {directory}/server.conf;\n}}\n"
    )
    with (directory / "error.log").open("wb") as log:
        process = subprocess.Popen(
            ["nginx", "-p", str(directory), "-c", str(main), "-e", "stderr"], stderr=log
        )
    try:
        wait_until(lambda: process.poll() is not None or accepts(own))
        assert process.poll() is None, (directory / "error.log").read_text()
        yield own
    finally:
        process.terminate()
        process.wait(20)


class Clients:
    """Threads that send requests, one after another; without retries, so that nothing is hidden."""

    def __init__(self, port: int, want: list[list[str]]) -> None:
        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60
        )
        self._want = want
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(CLIENTS)
        self._running = [self._pool.submit(self._work, random.Random(i)) for i in range(CLIENTS)]

    def _work(self, rng: random.Random) -> int:
        count = 0
        while not self._stop.is_set():
            which = rng.randrange(len(BODIES))
            assert self._ask(BODIES[which], rng.random() < 0.5) == self._want[which]
            count += 1
        return count

    def _ask(self, body: dict, stream: bool) -> list[str]:
        if not stream:
            return [choice.text for choice in complete(self._client, **body).choices]
        texts = [""] * body["n"]
        for chunk in complete(self._client, stream=True, **body):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts

    def stop(self) -> int:
        """How many requests were answered; raises what any of them met."""
        self._stop.set()
        try:
            return sum(running.result(120) for running in self._running)
        finally:
            self._pool.shutdown()


def test_a_rolling_restart_loses_nothing(tmp_path):
    servers = [Server("--ranks", "1") for _ in range(2)]
    try:
        for server in servers:
            server.wait_for("^ready: ")
        want = [[c.text for c in complete(servers[0].client(), **b).choices] for b in BODIES]
        with proxy(tmp_path, [server.port for server in servers]) as port:
            clients = Clients(port, want)
            for number in range(2):
                port = servers[number].port
                assert servers[number].stop() == 0
                servers[number].close()
                servers[number] = Server("--ranks", "1", port=port)
                servers[number].wait_for("^ready: ")
            assert clients.stop() > 2 * CLIENTS
            answers = (tmp_path / "access.log").read_text().splitlines()
            assert {line.split('" ')[1][:3] for line in answers} == {"200"}
    finally:
        for server in servers:
            server.close()
