"""The published vulnerabilities of this field, by number, each with a test that it is not ours.

- CVE-2024-50050 (llama-stack), CVE-2025-32444 (vLLM's Mooncake), CVE-2025-47277 (vLLM's
  PyNcclPipe): pickle from a socket, that socket open to the network.
- CVE-2026-34756 (vLLM): an unbounded `n` takes all memory before anything is checked.
- CVE-2025-48956 (vLLM): headers of any size are read into memory.
"""

import ast
import json
import os
import pickle
import socket
import stat
import time

import httpx
import psutil
import pytest
import torch
import zmq

from nanogpt.api.protocol import MAX_CHOICES, parse_completion
from nanogpt.cluster import broadcast, transport
from nanogpt.cluster.broadcast import Broadcast
from nanogpt.cluster.messages import MAX_MESSAGE_BYTES, Decoder, Frame, FromRank, ProtocolError
from nanogpt.errors import EngineError, InvalidRequest
from nanogpt.rundir import RunDir
from tests.server import ROOT
from tests.test_e2e import complete
from tests.test_imports import modules

# Pickle over a socket: CVE-2024-50050, CVE-2025-32444, CVE-2025-47277

UNPICKLES = {
    "recv_pyobj",
    "send_pyobj",
    "recv_serialized",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "eval",
    "exec",
}


def calls(module: str) -> set[str]:
    """Names of everything that a module calls, without what they belong to."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    source = path if path.exists() else path.with_suffix("") / "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                # A method of ours or of a library that happens to be called so is none of these.
                if function.attr not in ("eval", "exec"):
                    found.add(function.attr)
            elif isinstance(function, ast.Name):
                found.add(function.id)
    return found


@pytest.mark.parametrize("module", modules())
def test_nothing_calls_what_unpickles_or_evaluates(module):
    """pickle itself and torch.load are in test_imports.py."""
    assert not calls(module) & UNPICKLES


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_not_a_message(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for kind in (Frame, FromRank):
        with pytest.raises(ProtocolError):
            Decoder(kind)(bomb)
    assert not (tmp_path / "exploded").exists()


def test_pickles_sent_to_every_socket_of_a_server_are_dropped(server, client, tmp_path):
    """Even from a process of the same user, which alone may open the sockets at all."""
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    run_dir = RunDir.open("127.0.0.1", server.port)
    context = zmq.Context()
    for kind, endpoint in ((zmq.DEALER, run_dir.control), (zmq.PUSH, run_dir.events)):
        sender = context.socket(kind)
        sender.connect(endpoint)
        for message in (bomb, b"", b"\xc1" * 100, bomb * 1000):
            sender.send(message)
        sender.close(linger=2000)
    context.term()
    server.wait_for("dropped a message", count=4)
    assert complete(client).choices[0].text
    assert not (tmp_path / "exploded").exists()


def test_only_loopback_listens_and_the_sockets_are_private(server):
    """torchrun's stores listened on every interface, and its rendezvous unpickles."""
    addresses = set()
    for process in [psutil.Process(server.process.pid), *server.below()]:
        for found in process.net_connections(kind="inet"):
            if found.status == psutil.CONN_LISTEN:
                addresses.add(found.laddr.ip)
    assert addresses == {"127.0.0.1"}
    path = RunDir.open("127.0.0.1", server.port).path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert path.stat().st_uid == os.getuid()


# Sizes are bounded before anything is allocated


def test_a_huge_message_ends_its_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 1000)
    sockets = transport.FrontEndSockets(f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e")
    context = zmq.Context()
    sender = context.socket(zmq.PUSH)
    sender.connect(f"ipc://{tmp_path}/e")
    watching = sender.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    sender.send(bytes(1001))
    deadline = time.monotonic() + 10
    while not watching.poll(50):
        sockets.poll(0)
        assert time.monotonic() < deadline
    assert list(sockets.event_messages()) == []
    sender.disable_monitor()
    context.destroy(linger=0)
    sockets.close()


def test_an_announced_length_is_not_believed(monkeypatch):
    """Else a broken rank 0 would have the others allocate 4 GiB."""

    class Done:
        def is_completed(self) -> bool:
            return True

        def wait(self) -> None:
            pass

    def receive(tensor: torch.Tensor, **_):
        tensor[:4] = torch.tensor([255, 255, 255, 255], dtype=torch.uint8)
        return Done()

    monkeypatch.setattr(broadcast.dist, "broadcast", receive)
    with pytest.raises(EngineError, match=f"limit {MAX_MESSAGE_BYTES}"):
        Broadcast(1, 2, None).poll()


# Unbounded n: CVE-2026-34756


@pytest.mark.parametrize("field", ["n", "best_of"])
@pytest.mark.parametrize("value", [MAX_CHOICES + 1, 10**6, 2**62])
def test_unbounded_choices_are_refused_by_the_parser(field, value):
    body = json.dumps({"model": "m", "prompt": "x", field: value}).encode()
    with pytest.raises(InvalidRequest) as refused:
        parse_completion(body, "application/json")
    assert refused.value.param == field


def test_prompts_times_n_is_bounded_too(server):
    """131,072 choices, each within its own limit."""
    started = time.monotonic()
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "shakespeare-char", "prompt": ["a"] * 1024, "n": 128, "max_tokens": 200},
        timeout=30,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - started < 10


# Headers of any size: CVE-2025-48956


def first_line(server, head: bytes) -> bytes:
    """Status line of the answer to a head that never ends, sent until the server stops reading."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=3) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        try:
            for _ in range(2000):  # 128 MiB at the most
                connection.sendall(head)
        except OSError:
            pass  # it has closed
        try:
            while piece := connection.recv(4096):
                answer += piece
        except OSError:
            pass  # a reset, when it closed with our bytes unread
        return answer.partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "head",
    [b"X-Long: " + b"a" * 65536, b"X-Many: a\r\n" * 6000],
    ids=["one long header", "many headers"],
)
def test_headers_without_end_are_cut_off(server, head):
    before = sum(p.memory_info().rss for p in server.below())
    line = first_line(server, head)
    assert line == b"" or b" 431 " in line
    after = sum(p.memory_info().rss for p in server.below())
    assert after - before < 64 * 2**20


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b" 414 "),
        (b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n", b" 431 "),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: a\r\n" * 101 + b"\r\n", b" 431 "),
    ],
    ids=["long line", "long header", "many headers"],
)
def test_a_head_over_the_limits_is_told_so(server, head, status):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head)
        assert status in connection.recv(4096).partition(b"\r\n")[0]
