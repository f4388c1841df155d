"""Two machines, one cluster: a request's choices on both, and what becomes of it when one is lost.

The machines are network namespaces where this user may make them (see nodes.py).
"""

import concurrent.futures
import contextlib
import pickle
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from nanogpt.network import free_port
from tests.nodes import Node, nodes
from tests.server import Server
from tests.test_e2e import complete, wait_until

CHOICES = 4
LISTEN = "0A"  # a state in /proc/net/tcp
QUICK = {"NANOGPT_CLUSTER_WATCHDOG_S": "2", "NANOGPT_CLUSTER_NODE_WAIT_S": "2"}


class Pair:
    """Two launchers, each on a machine of its own; `server` is the first one's."""

    def __init__(self, machines: list[Node], environ: dict[str, str]) -> None:
        self.machines, self._environ = machines, environ
        self.store_port = free_port()
        self.second = self.launch(1)
        self.server = self.launch(0)

    def launch(self, number: int, *options: str) -> Server:
        machine = self.machines[number]
        return Server(
            *("--ranks", "1", "--nnodes", "2", "--node-rank", str(number)),
            *("--rdzv-endpoint", f"{self.machines[0].address}:{self.store_port}", *options),
            environ=self._environ,
            host=machine.address,
            within=machine.within,
        )

    def lose_second(self) -> None:
        """kill -9 of everything on the second machine."""
        for process in [*self.second.below(), psutil.Process(self.second.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.second.close()

    def start_second(self, *options: str) -> None:
        self.second = self.launch(1, *options)

    def who(self) -> str:
        """The ranks that generate a request's choices."""
        raw = self.server.client().completions.with_raw_response.create(
            model="shakespeare-char", prompt="ROMEO:", n=CHOICES, max_tokens=4
        )
        assert len(raw.parse().choices) == CHOICES
        return raw.headers["x-nanogpt-ranks"]

    def wait_for(self, ranks: str) -> None:
        end = time.monotonic() + 60
        while (found := self.who()) != ranks:
            assert time.monotonic() < end, found
            time.sleep(0.5)

    def wait_for_another_group(self) -> None:
        """Wait until the first machine, alone by now, has heard of the second one again."""
        before = self.groups
        wait_until(lambda: self.groups > before, 60)

    @property
    def groups(self) -> int:
        return self.server.output.count("another group has begun")

    def close(self) -> None:
        self.second.close()
        self.server.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with nodes(2) as machines:
        found = Pair(machines, QUICK)
        try:
            found.server.wait_for("^ready: ")
            yield found
        finally:
            found.close()


@contextlib.contextmanager
def streaming(server: Server, seed: int) -> Iterator[None]:
    """A stream of four choices is open in here, and ends as if nothing had happened."""
    client = server.client(timeout=120)
    params = {"n": CHOICES, "seed": seed, "max_tokens": 120}
    want = [c.text for c in complete(client, **params).choices]
    texts = [""] * CHOICES

    def read() -> None:
        for chunk in complete(client, stream=True, **params):
            for choice in chunk.choices:
                texts[choice.index] += choice.text

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        wait_until(lambda: all(texts) or reading.done())
        assert not reading.done()
        yield
        reading.result(120)
    assert texts == want


def test_choices_are_shared_across_machines(pair):
    assert pair.who() == "0,1,0,1"
    assert "ranks: 2" in pair.server.wait_for("^ready: ")


def test_a_machine_that_is_lost_is_gone_without_until_it_is_back(pair):
    """Also its launcher and torchrun are gone, at once, and others are started there."""
    with streaming(pair.server, seed=2):
        pair.lose_second()
    pair.server.wait_for("going on with 1 of 2 ranks")
    assert pair.who() == "0,0,0,0"
    with streaming(pair.server, seed=3):
        pair.start_second()
        pair.wait_for_another_group()
    pair.wait_for("0,1,0,1")


def test_a_cut_network_is_a_pause(pair):
    """No connection is told: silence is all there is to notice."""
    if not pair.machines[1].link:
        pytest.skip("no network namespaces here")
    with streaming(pair.server, seed=4):
        pair.machines[1].cut()
    assert pair.who() == "0,0,0,0"
    with streaming(pair.server, seed=5):
        pair.machines[1].mend()
        pair.wait_for_another_group()
    pair.wait_for("0,1,0,1")


def test_another_set_of_weights_is_refused(pair):
    """A request would get text of both."""
    pair.lose_second()
    pair.start_second("--dtype", "bfloat16")
    assert pair.second.process.wait(60) == 2
    assert "node 1 has other weights" in pair.second.output
    pair.wait_for("0,0,0,0")
    pair.second.close()
    pair.start_second()
    pair.wait_for("0,1,0,1")


# What listens


def listening(server: Server) -> set[tuple[str, int]]:
    """Addresses and ports, as the machine of the server sees them."""
    inodes = set()
    for process in [psutil.Process(server.process.pid), *server.below()]:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(link.readlink().name)
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in inodes:
                words, _, port = fields[1].partition(":")
                raw = bytes.fromhex(words)
                raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found


def test_each_machine_listens_on_its_own_address_only(pair):
    """So that a firewall for one network is enough: nothing listens on all of them."""
    for machine, server in zip(pair.machines, (pair.server, pair.second), strict=True):
        addresses = {address for address, _ in listening(server)}
        assert machine.address in addresses
        assert addresses <= {machine.address, "127.0.0.1"}


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_whoever_reaches_the_ports_is_not_let_in(pair):
    """No key, no events; no port unpickles; and what strangers send ends nothing."""
    ports = [port for address, port in listening(pair.server) if address != "127.0.0.1"]
    ports.remove(pair.server.port)
    assert pair.store_port in ports
    context = zmq.Context()
    for port in ports:
        stranger = context.socket(zmq.PUSH)
        stranger.connect(f"tcp://{pair.machines[0].address}:{port}")
        stranger.send(pickle.dumps(Bomb()))
        stranger.close(linger=200)
        with socket.create_connection((pair.machines[0].address, port), timeout=5) as connection:
            connection.sendall(pickle.dumps(Bomb()) * 100)
    context.destroy(linger=0)
    pair.wait_for("0,1,0,1")
    assert "exploded" not in pair.server.output + pair.second.output
    assert "dropped a message" not in pair.server.output


# The first machine


def test_the_second_machine_waits_for_the_first_and_ends_at_once_when_told_to(pair):
    assert pair.server.stop() == 0
    pair.server.close()
    pair.server = pair.launch(0)
    pair.server.wait_for("^ready: ")
    pair.wait_for("0,1,0,1")
    below = pair.second.below()
    assert pair.second.stop(signal.SIGTERM) == 0
    assert not psutil.wait_procs(below, timeout=10)[1]
