"""Faults through real processes, one by one: what the client sees, and that all comes back.

dev/FAILURES.md has the matrix. Faults at random, and many of them, are the chaos command's.
"""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import psutil
import pytest

from nanogpt.network import free_port
from tests.deployments import Deployment
from tests.poison.sitecustomize import EXIT_0, HANG, MARK, MEMORY, SEGMENTATION_FAULT
from tests.server import ROOT, Server, serving
from tests.test_e2e import complete, wait_until

QUICK = {
    "NANOGPT_CLUSTER_WATCHDOG_S": "2",
    "NANOGPT_CLUSTER_STUCK_S": "3",
    "PYTHONPATH": f"{ROOT / 'tests' / 'poison'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}


@pytest.fixture(scope="module")
def fragile():
    """A server of two ranks that notices soon, and knows deadly requests."""
    with serving("--ranks", "2", environ=QUICK) as server:
        yield server


# Long enough for a fault that is noticed a second later: a dozen steps take a prompt's time each.
SECONDS = {"max_tokens": 262, "extra_body": {"past_context": "crop"}}


ORDINARY = {"n": 4, "seed": 9, "max_tokens": 100, "logprobs": 1}
# What victims have to get, by their parameters: the same from every server of this file.
WANTED: dict[str, list] = {}


def wanted(server: Server, **params) -> list:
    """(text, log probabilities, finish_reason) of each choice."""
    key = repr(sorted(params.items()))
    if key not in WANTED:
        WANTED[key] = [
            (c.text, c.logprobs.token_logprobs, c.finish_reason)
            for c in complete(server.client(timeout=120), **params).choices
        ]
    return WANTED[key]


class Victim:
    """A stream that is open while the fault happens, and must be as if nothing had."""

    def __init__(self, server: Server, **params) -> None:
        self._params = {**ORDINARY, **params}
        self._client = server.client(timeout=120)
        self._want = wanted(server, **self._params)
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, list[float]] = {}
        self._ends: dict[int, str] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._reading = self._pool.submit(self._read)
        wait_until(lambda: sum(map(len, self._texts.values())) > 20 or self._reading.done())
        assert not self._reading.done()

    def _read(self) -> None:
        for chunk in complete(self._client, stream=True, **self._params):
            for c in chunk.choices:
                assert c.index not in self._ends
                self._texts[c.index] = self._texts.get(c.index, "") + c.text
                self._logprobs.setdefault(c.index, []).extend(c.logprobs.token_logprobs)
                if c.finish_reason:
                    self._ends[c.index] = c.finish_reason

    def check(self) -> None:
        self._reading.result(120)
        got = [(self._texts[i], self._logprobs[i], self._ends[i]) for i in sorted(self._texts)]
        assert got == self._want


def parent_of(rank: psutil.Process) -> psutil.Process:
    return rank.parent()


def torchrun(server: Server) -> psutil.Process:
    return next(p for p in server.below() if "nanogpt.agent" in p.cmdline())


def front_end(server: Server) -> tuple[psutil.Process, psutil.Process]:
    """(gunicorn's master, its worker)."""
    found = [p for p in server.below() if any(c.endswith("frontend.py") for c in p.cmdline()[:3])]
    worker = next(p for p in found if p.parent() in found)
    return worker.parent(), worker


@pytest.mark.parametrize(
    "fault",
    [
        lambda server: server.ranks()[0].kill(),
        lambda server: [rank.kill() for rank in server.ranks()],
        lambda server: server.ranks()[1].suspend(),
        lambda server: parent_of(server.ranks()[0]).kill(),
        lambda server: parent_of(server.ranks()[1]).suspend(),
        lambda server: torchrun(server).kill(),
        lambda server: torchrun(server).suspend(),
    ],
    ids=[
        "kill rank 0",
        "kill all ranks",
        "stop a rank",
        "kill a rank's parent",
        "stop a rank's parent",
        "kill torchrun",
        "stop torchrun",
    ],
)
def test_a_fault_is_a_pause(fragile, fault):
    """Whatever dies or stops below the launcher but the front end itself: an open stream of four
    choices on both ranks goes on with the same text and log probabilities."""
    before = {p.pid for p in fragile.ranks()}
    victim = Victim(fragile)
    fault(fragile)
    victim.check()
    # Also those that were only stopped are replaced, before the next one needs them.
    wait_until(lambda: len({p.pid for p in fragile.ranks()} - before) == 2, 60)
    assert complete(fragile.client(timeout=60)).choices[0].text


def test_a_stopped_front_end_loses_nothing(fragile):
    """Tokens queue up meanwhile, and its own pause doesn't make it take the ranks for dead."""
    ranks = {p.pid for p in fragile.ranks()}
    victim = Victim(fragile)
    _, worker = front_end(fragile)
    worker.suspend()
    time.sleep(3.5)  # longer than the watchdog's patience
    worker.resume()
    victim.check()
    assert {p.pid for p in fragile.ranks()} == ranks


def deadly(what: int) -> dict:
    return {"prompt": [*MARK, what], "max_tokens": 5}


@pytest.mark.parametrize(
    "what",
    [MEMORY, SEGMENTATION_FAULT, HANG],
    ids=["out of memory", "segmentation fault", "a step without end"],
)
def test_a_deadly_request_is_given_up_and_the_others_live(fragile, what):
    victim = Victim(fragile)
    with pytest.raises(openai.InternalServerError) as failed:
        complete(fragile.client(timeout=120), **deadly(what))
    assert failed.value.status_code == 500
    assert set(failed.value.body) == {"message", "type", "param", "code"}
    victim.check()


def test_a_request_that_exits_with_0_is_retried_like_a_kill(fragile):
    """Nobody can tell it from an operator's doing; its rank comes back all the same."""
    client = fragile.client(timeout=120)
    with client.completions.with_streaming_response.create(
        model="shakespeare-char", stream=True, **deadly(EXIT_0)
    ):
        fragile.wait_for(r"died \(exit code 0\)")
    assert complete(client).choices[0].text


def comes_back(server: Server) -> None:
    """Wait until somebody listens again, and for the old front end's work to be aborted."""
    client = server.client(timeout=60)

    def answers() -> bool:
        try:
            return bool(complete(client).choices[0].text)
        except (openai.APIConnectionError, openai.InternalServerError):
            return False  # nobody listens yet, or no worker group has come to the new one

    wait_until(answers, 30)
    wait_until(lambda: Deployment(server, server).running() == 0)


def test_a_killed_worker_of_the_front_end_breaks_its_connections_and_comes_back(fragile):
    master, worker = front_end(fragile)
    stream = complete(fragile.client(), n=4, max_tokens=200, stream=True)
    next(iter(stream))
    worker.kill()
    with pytest.raises((httpx.RemoteProtocolError, openai.APIConnectionError)):
        list(stream)
    comes_back(fragile)
    new_master, new_worker = front_end(fragile)
    assert new_master.pid == master.pid
    assert new_worker.pid != worker.pid


def test_a_killed_master_of_the_front_end_breaks_nothing(fragile):
    """Its worker finishes what it has, refuses what is new meanwhile, and makes room."""
    master, worker = front_end(fragile)
    victim = Victim(fragile, **SECONDS)
    master.kill()
    wait_until(lambda: draining(fragile), 5)
    victim.check()
    wait_until(lambda: not worker.is_running(), 10)
    comes_back(fragile)
    assert front_end(fragile)[0].pid != master.pid


def draining(server: Server) -> bool:
    try:
        complete(server.client())
    except openai.InternalServerError as error:
        return error.body["code"] == "draining" and bool(error.response.headers["Retry-After"])
    return False


def test_a_drain_finishes_what_was_accepted_and_tells_the_others():
    """A new connection was refused during a drain: gunicorn closes its socket first."""
    with serving() as server:
        victim = Victim(server, **SECONDS)
        processes = server.below()
        assert len(processes) >= 4  # torchrun, a rank, the front end's master and worker
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: draining(server), 5)
        victim.check()
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.output
        assert "rror" not in server.output
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive


@pytest.mark.parametrize(
    "fault",
    [
        lambda server: torchrun(server).suspend(),
        lambda server: server.ranks()[0].kill(),
    ],
    ids=["stop torchrun", "kill a rank"],
)
def test_a_fault_during_a_drain_is_a_pause(fault):
    with serving(environ={**QUICK, "NANOGPT_HTTP_DRAIN_S": "90"}) as server:
        victim = Victim(server, **SECONDS)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: draining(server), 5)
        fault(server)
        victim.check()
        assert server.process.wait(30) == 0


def test_a_front_end_that_is_stopped_drains_all_the_same():
    """Its master did not take the signal, and took new connections until all were cut off."""
    with serving() as server:
        victim = Victim(server, **SECONDS)
        front_end(server)[0].suspend()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: draining(server), 5)
        victim.check()
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    "stopped",
    [lambda server: [torchrun(server)], front_end],
    ids=["torchrun", "the front end"],
)
def test_a_killed_launcher_takes_what_is_stopped_with_it(stopped):
    with serving() as server:
        below = server.below()
        for process in stopped(server):
            process.suspend()
        server.process.kill()
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive


def test_a_drain_just_after_the_master_was_killed_breaks_nothing():
    """Its worker still writes to clients. Found by the chaos command."""
    with serving() as server:
        victim = Victim(server, **SECONDS)
        front_end(server)[0].kill()
        server.process.send_signal(signal.SIGTERM)
        victim.check()
        assert server.process.wait(30) == 0


def test_a_drain_has_an_end():
    """What takes longer than drain_s is told so, and the server ends all the same."""
    with serving(environ={"NANOGPT_HTTP_DRAIN_S": "0.5"}) as server:
        stream = complete(server.client(), n=64, max_tokens=240, stream=True)
        next(iter(stream))
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shut down before"):
            list(stream)
        assert server.process.wait(30) == 0
        assert time.monotonic() - started < 20


def test_ranks_that_can_not_start_are_a_clear_end(tmp_path):
    """A rank that finds its weights unreadable has all of it end with code 2, not try for ever."""
    weights = tmp_path / "weights"
    weights.mkdir()
    source = ROOT / "nanogpt" / "weights" / "shakespeare-char"
    for path in source.iterdir():
        os.link(path, weights / path.name) if path.suffix == ".json" else None
    (weights / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    server = Server("--model", f"x={weights}")
    try:
        assert server.process.wait(60) == 2
        assert "Traceback" not in server.output
        assert len(re.findall("^error: ", server.output, re.M)) == 1
    finally:
        server.close()


def test_threads_that_send_at_once_are_all_answered_across_a_kill(fragile):
    """Requests that arrive while nobody is there to generate wait, and then get their answers."""
    client = fragile.client(timeout=120)
    want = [c.text for c in complete(client, n=2, seed=3).choices]
    stop = threading.Event()

    def ask() -> list[list[str]]:
        texts = []
        while not stop.is_set():
            texts.append([c.text for c in complete(client, n=2, seed=3).choices])
        return texts

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        for _ in range(3):
            time.sleep(0.7)
            wait_until(lambda: len(fragile.ranks()) == 2)
            fragile.ranks()[1].kill()
        time.sleep(1.0)
        stop.set()
        answers = [text for f in asking for text in f.result(120)]
    assert len(answers) >= 6
    assert all(text == want for text in answers)


def test_a_bare_torchrun_restarts_and_drains_too(tmp_path):
    """Without our launcher: SIGTERM to torchrun ended the ranks under open connections. The same
    signal comes from torchrun to the others when a rank's parent was killed: no drain, then."""
    port = free_port()
    environ = {
        **os.environ,
        "NANOGPT_RUN_DIR": str(tmp_path / "run"),
        "NANOGPT_ADMISSION_STATE": ":memory:",
        "NANOGPT_JOBS_PATH": str(tmp_path / "jobs"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    worker = [str(ROOT / "rank_worker.py"), "--port", str(port), "--device", "cpu"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun = subprocess.Popen(
        [*agent, "--nproc-per-node=2", "--max-restarts=9", *worker], cwd=ROOT, env=environ
    )
    below = psutil.Process(torchrun.pid)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), 60)
        body = {"model": "shakespeare-char", "prompt": "A", "n": 2, "seed": 1, "max_tokens": 200}
        want = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pending = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            time.sleep(0.3)
            next(p for p in below.children() if "rank_worker" in " ".join(p.cmdline())).kill()
            assert pending.result(60).json()["choices"] == want
            pending = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            time.sleep(0.3)
            processes = below.children(recursive=True)
            torchrun.send_signal(signal.SIGTERM)
            got = pending.result(60)
        assert got.status_code == 200
        assert got.json()["choices"] == want
        torchrun.wait(40)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
    finally:
        for process in below.children(recursive=True) if below.is_running() else []:
            process.kill()
        torchrun.kill()
        torchrun.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


def test_an_idle_group_notices_a_death_at_once(fragile):
    """gloo tells rank 0 nothing while it has nothing to send: the group stayed dead, unnoticed,
    until the next request."""
    wait_until(lambda: len(fragile.ranks()) == 2)
    before = {p.pid for p in fragile.ranks()}
    fragile.ranks()[1].kill()
    wait_until(lambda: len({p.pid for p in fragile.ranks()} - before) == 2, 10)


def test_a_cluster_thread_that_fails_ends_its_process():
    """Else every request would wait for ever, with /health as green as before."""
    code = (
        "from nanogpt.cluster.client import ClusterClient\n"
        "from nanogpt.cluster.watch import Watch\n"
        "def sockets(): raise RuntimeError('why')\n"
        "client = ClusterClient(sockets, watch=Watch(watchdog_s=9), max_outstanding=1)\n"
        "client.start()\n"
        "import time; time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=20)
    assert done.returncode == -signal.SIGKILL
