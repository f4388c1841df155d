"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys

import msgspec
import pytest

from nanogpt import options
from nanogpt.config import PROJECT

README = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def run(command: list[str], server) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_example(server):
    (text,) = [block for block in blocks("sh") if block.startswith("curl")]
    command = shlex.split(text.replace("http://127.0.0.1:8000", server.url).replace("\\\n", ""))
    got = msgspec.json.decode(run([*command, "-s"], server))
    shown = msgspec.json.decode(blocks("json")[0])
    assert got.keys() == shown.keys()
    assert got["usage"] == shown["usage"]
    assert [c.keys() for c in got["choices"]] == [c.keys() for c in shown["choices"]]


def test_python_example(server):
    (text,) = blocks("python")
    code = text.replace("http://127.0.0.1:8000", server.url)
    assert len(run([sys.executable, "-c", code], server)) > 100


def launch_lines() -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [line.partition("#")[0] for line in lines if line.startswith("./launch.sh")]


@pytest.mark.parametrize("line", launch_lines())
def test_launch_examples_are_understood(line):
    options.parse(shlex.split(line)[1:], {})


@pytest.mark.parametrize("module", ["nanogpt.data.prepare"])
def test_shown_modules_explain_themselves(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "usage" in done.stdout


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:configs|dev|nanogpt)/[\w./-]+)`", README)))
)
def test_paths_exist(path):
    assert (PROJECT / path).exists()


def test_admin_examples_are_understood(tmp_path):
    lines = [x for x in "\n".join(blocks("sh")).splitlines() if "nanogpt.admin" in x]
    for line in lines:
        arguments = shlex.split(line)[3:]
        state = ["--state", str(tmp_path / "state.sqlite")]
        command = [sys.executable, "-m", "nanogpt.admin", *state, *arguments]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert lines
