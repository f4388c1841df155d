"""Servers side by side: turns, ratios, servers that are started and stopped, commits."""

import json
import os
import subprocess
import sys
import time

import pytest

from nanogpt import process
from nanogpt.bench import compare, revisions
from nanogpt.bench.__main__ import main, parser
from nanogpt.bench.connection import Url
from nanogpt.bench.contest import compare as contest
from nanogpt.bench.entrants import entrants_of
from nanogpt.bench.load import Round
from nanogpt.bench.managed import ManagedServer
from nanogpt.bench.outcome import Outcome
from nanogpt.bench.target import Target
from nanogpt.bench.workload import Workload
from nanogpt.config import PROJECT
from nanogpt.errors import ConfigError, StartupError
from nanogpt.network import free_port

URL = Url.parse("http://127.0.0.1:1/v1")
LOAD = Workload(name="w", requests=1, concurrency=1)


def round_of(tokens_per_s: float, ttft_ms: float, **changes) -> Round:
    first = 100 + ttft_ms / 1000
    fields = {"arrivals": {0: [first, first + 0.5]}, "output_tokens": int(tokens_per_s * 10)}
    one = Outcome(started=100.0, ended=101.0, **{"status": 200, **fields, **changes})
    return Round(outcomes=[one], seconds=10.0, client_cpu=0.1)


def compared(**rounds):
    turns = []
    left = {name: iter(each) for name, each in rounds.items()}

    def run(target, workload, seed, label):
        turns.append((target.name, seed))
        return next(left[target.name])

    targets = [Target(name=name, url=URL, model="m") for name in rounds]
    count = len(next(iter(rounds.values())))
    return contest(targets, LOAD, count, 7, run), turns


def test_servers_take_turns_with_the_same_prompts():
    same = [round_of(10, 5)] * 3
    _, turns = compared(a=same, b=same, c=same)
    assert turns == [(name, seed) for seed in (7, 8, 9) for name in "abc"]


def test_ratios_are_of_medians_and_of_pairs():
    """The machine is slow in the last round: ratios of pairs hardly notice."""
    a = [round_of(100, 10), round_of(110, 11), round_of(50, 20)]
    b = [round_of(200, 20), round_of(210, 21), round_of(105, 41)]
    found, _ = compared(a=a, b=b)
    base, other = found.servers
    assert base.figures["output tokens/s"].ratio == 1.0
    rate = other.figures["output tokens/s"]
    assert (rate.median, rate.low, rate.high) == (200, 105, 210)
    assert rate.ratio == pytest.approx(2.0)
    assert rate.ratio_low == pytest.approx(210 / 110)
    assert rate.ratio_high == pytest.approx(105 / 50)
    assert other.figures["TTFT ms"].ratio == pytest.approx(21 / 11)
    text = compare.describe(found)
    assert "2.00 (1.91 to 2.10)" in text


def test_a_figure_that_a_server_lacks_is_not_compared():
    whole = [round_of(10, 5, arrivals={})]
    found, _ = compared(a=whole, b=[round_of(20, 5)])
    assert "TTFT ms" not in found.servers[1].figures
    assert found.servers[1].figures["output tokens/s"].ratio == 2.0


def test_failures_are_told():
    broken = [round_of(10, 5, status=500, error="boom", arrivals={})]
    found, _ = compared(a=[round_of(10, 5)], b=broken)
    assert found.servers[1].figures == {}
    assert "b: 1 of 1 failed: boom" in compare.describe(found)


# Who takes part


def entrants(*argv):
    return entrants_of(parser().parse_args(["compare", *argv]))


def test_entrants_by_url():
    found = entrants("--a", "http://h:1/v1", "--b", "http://h:2/v1,model=x")
    assert [(e.name, e.url, e.model) for e in found] == [
        ("a", "http://h:1/v1", ""),
        ("b", "http://h:2/v1", "x"),
    ]
    found = entrants("--server", "x=http://h:1/v1?q=1", "--server", "y=http://h:2/v1")
    assert [e.name for e in found] == ["x", "y"]


def test_a_command_may_choose_its_port():
    (one, two) = entrants("--a-command", "run -p {port}", "--command", "z=run --port={port}")
    port = one.command.split()[-1]
    assert one.url == f"http://127.0.0.1:{port}/v1"
    assert (two.name, two.command) == ("z", f"run --port={Url.parse(two.url).port}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--server", "http://h:1/v1"), "NAME=URL"),
        (("--server", "x=http://h:1", "--server", "x=http://h:2"), "each name once"),
        (("--a", "http://h:1,modle=x"), "URL,model=NAME"),
        (("--a-command", "run"), "where its server is"),
    ],
)
def test_bad_entrants(argv, message):
    with pytest.raises(ConfigError, match=message):
        entrants(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--a", "http://127.0.0.1:1/v1"), "two servers are needed"),
        (("--commits", "HEAD", "no-such-commit"), "'no-such-commit' is no commit"),
        (("--a-command", "exit 3 # {port}", "--b", "http://h:1"), "ended with exit code 3"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(["compare", "--workload", "W1", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# Servers that are started


def test_nothing_is_left_of_a_started_server():
    """Also not of a grandchild that ignores SIGTERM."""
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(60)"
    code = f"import subprocess,sys; subprocess.Popen([sys.executable,'-uc',{child!r}]).wait()"
    server = ManagedServer(
        "x", f'{sys.executable} -c "{code}"', f"http://127.0.0.1:{free_port()}/v1", stop_s=0.3
    )
    deadline = time.monotonic() + 20
    while b"1" not in server.output() and time.monotonic() < deadline:
        time.sleep(0.02)
    below = process.descendants(server.pid)
    assert len(below) > 1
    server.stop()
    assert all(process.has_ended(pidfd, 5) for pidfd in below)
    for pidfd in below:
        os.close(pidfd)


def test_a_server_that_is_never_ready_is_told():
    server = ManagedServer("x", "echo loading; sleep 60", f"http://127.0.0.1:{free_port()}/v1")
    try:
        with pytest.raises(StartupError, match=r"not ready .* loading"):
            server.wait(0.5)
    finally:
        server.stop()


# Commits


def test_names_of_commits():
    head = subprocess.run(
        ["git", "-C", str(PROJECT), "rev-parse", "--short=8", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert revisions.names(["HEAD", "HEAD", "."]) == [head, f"{head}'", "here"]


def test_a_commit_is_checked_out(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "build_kernels", lambda name, path: None)
    path = revisions.check_out("HEAD", "one", tmp_path)
    assert (path / "launch.sh").exists()
    assert (path / "nanogpt" / "launch.py").exists()
    assert revisions.check_out(".", "here", tmp_path) == PROJECT


def test_compare_real_servers(server, capsys, tmp_path):
    """The server of the other tests against one that is started, and stopped, here."""
    command = f"exec {sys.executable} -m nanogpt.launch --device cpu --port {{port}}"
    argv = ["compare", "--a", f"{server.url}/v1,model=shakespeare-char", "--b-command", command]
    argv += ["--concurrency", "2", "--requests", "2", "--output-len", "4", "--rounds", "2"]
    plot = tmp_path / "p.png"
    assert main([*argv, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "/ a" in out
    result = json.loads(out.splitlines()[-1])
    (found,) = result["results"]["comparisons"]
    assert [s["server"] for s in found["servers"]] == ["a", "b"]
    assert [s["report"]["output_tokens"] for s in found["servers"]] == [16, 16]
    assert found["servers"][1]["figures"]["output tokens/s"]["ratio"] > 0
    assert set(result["results"]["idle_cpu"]) == {"b"}
    assert plot.read_bytes().startswith(b"\x89PNG")
