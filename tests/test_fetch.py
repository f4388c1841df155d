"""nanogpt fetch: against a stand-in of the hub, with connections that break and bytes that are
wrong; and the command line it is a part of."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nanogpt import __main__ as command_line
from nanogpt import fetch, registry
from nanogpt.config import PROJECT
from nanogpt.errors import CheckpointError
from nanogpt.model.hub_blob import fetch_blob
from tests import hub_standin
from tests.hf_models import TINY, write_model

REPO = "openai-community/gpt2"
CUT_AT = 11_000_000  # the hub's client writes pieces of 10 MiB
KEPT = 10 * 2**20


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub") / "repo"
    write_model(directory, **TINY | {"n_embd": 64})  # 13 MB
    return directory


@pytest.fixture
def hub(published):
    with hub_standin.serving(REPO, published) as hub:
        yield hub


class Runner:
    """The real command in a process of its own, with an empty cache."""

    def __init__(self, url, home):
        self.home = home
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self._environ |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "nanogpt", "fetch", *arguments],
            cwd=PROJECT,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def unfinished(self):
        """Whether a piece has been written."""
        return any(f.stat().st_size >= KEPT for f in self.home.glob("hub/**/*.nanogpt-part"))


@pytest.fixture
def run(hub, tmp_path):
    return Runner(hub.url, tmp_path / "home")


def test_downloads_once_and_checks(run, hub, published, tmp_path):
    done = run("gpt2")
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "home").glob("hub/models--*/snapshots/*")
    assert done.stdout == f"gpt2: {directory}\n"
    for name in ("model.safetensors", "config.json", "vocab.json", "merges.txt"):
        assert (directory / name).read_bytes() == (published / name).read_bytes()
    assert hub.ranges == [None]
    again = run("gpt2")  # from the cache, without a word to the hub about weights
    assert (again.returncode, again.stdout, hub.ranges) == (0, done.stdout, [None])
    size = (directory / "model.safetensors").stat().st_size
    with open((directory / "model.safetensors").resolve(), "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff\x00\xff")
    damaged = run("gpt2")
    assert damaged.returncode == 2
    assert "model.safetensors was damaged" in damaged.stderr
    assert run("gpt2").returncode == 0
    assert len(hub.ranges) == 2


def test_goes_on_where_the_connection_broke(run, hub, published):
    """The rest alone is asked for, by the same process or the next one."""
    hub.cut_at, hub.cuts = CUT_AT, 1
    done = run("gpt2")
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [None, f"bytes={KEPT}-"]


def test_goes_on_after_a_process_that_was_killed(run, hub):
    hub.cut_at, hub.stall = CUT_AT, True
    process = run.start("gpt2")
    assert hub.stalled.wait(60)
    deadline = time.monotonic() + 30
    while not run.unfinished() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    hub.stall = False
    done = run("gpt2")
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [None, f"bytes={KEPT}-"]


def test_a_network_that_goes_away_is_one_line(run, hub):
    hub.cut_at, hub.stall = CUT_AT, True
    process = run.start("gpt2")
    assert hub.stalled.wait(60)
    hub.gone = True
    hub.stall = False
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "check the name and the network" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert run.unfinished()


def test_who_waited_goes_on_where_the_other_ended(monkeypatch, tmp_path):
    """Not where that one was when it began to wait."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = SimpleNamespace(etag="e" * 64, size=100)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *a, **k: found)
    asked = []

    def http_get(url, file, *, resume_size, **more):
        asked.append(resume_size)
        file.write(b"x" * (found.size - resume_size))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", http_get)
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    with open(blobs / ("e" * 64 + ".nanogpt-part"), "ab") as other:
        other.write(b"x" * 40)
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=fetch_blob, args=("a/b", "main", "model.safetensors"))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        other.write(b"x" * 30)
    waiting.join(30)
    assert asked == [70]
    assert (blobs / ("e" * 64)).read_bytes() == b"x" * 100


def test_a_tokenizer_that_another_program_left_out_is_added(run, hub, tmp_path):
    assert run("gpt2").returncode == 0
    (directory,) = (tmp_path / "home").glob("hub/models--*/snapshots/*")
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink()
    assert run("gpt2").returncode == 0
    assert (directory / "vocab.json").exists()
    assert (directory / "merges.txt").exists()
    assert hub.ranges == [None]  # the weights were not asked for again


def test_wrong_bytes_are_not_kept(run, hub, tmp_path):
    hub.damage = True
    done = run("gpt2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model.safetensors was damaged")
    assert not list((tmp_path / "home").glob("hub/models--*/snapshots/*/model.safetensors"))


def test_what_can_not_be_fetched(run, hub):
    for name, said in (
        ("shakespeare-finetune", "train --config configs/train/shakespeare_finetune.toml"),
        ("nobody/nothing", "check the name and the network"),
        ("/a/path", "neither a known model nor a name on the hub"),
    ):
        done = run(name)
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]


def test_no_room_is_said_before_the_download(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not/yet"))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr("nanogpt.fetch.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"gpt2-xl takes 6\.2 GB, .* has 1\.0 GB free"):
        fetch.fetch("gpt2-xl", registry.read_cards())
    blobs = tmp_path / "not/yet/models--openai-community--gpt2-xl/blobs"
    blobs.mkdir(parents=True)
    with open(blobs / "e.nanogpt-part", "wb") as part:
        part.truncate(5 * 10**9)  # sparse: it is here already
    with pytest.raises(CheckpointError, match=r"gpt2-xl takes 1\.2 GB, .* has 1\.0 GB free"):
        fetch.fetch("gpt2-xl", registry.read_cards())


class TestCommandLine:
    def test_every_command_is_there(self, capsys):
        for name in command_line.COMMANDS:
            with pytest.raises(SystemExit) as left:
                command_line.main([name, "--help"])
            assert left.value.code == 0
            assert capsys.readouterr().out.startswith("usage: ")

    def test_help_names_every_command(self, capsys):
        assert command_line.main([]) == 0
        said = capsys.readouterr().out
        assert all(f"  {name} " in said for name in command_line.COMMANDS)

    def test_unknown_command(self, capsys):
        assert command_line.main(["fech"]) == 2
        assert "unknown command 'fech'; did you mean 'fetch'?" in capsys.readouterr().err

    def test_status_of_a_command(self, capsys):
        assert command_line.main(["fetch", "/a/path"]) == 2
        assert command_line.main(["fetch", "shakespeare-char"]) == 0
