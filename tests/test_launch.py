"""The launcher's checks, the run directory, and what the system does for a process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt import launch, network, options, preflight, process
from nanogpt.config import PROJECT, ServeConfig
from nanogpt.errors import StartupError
from nanogpt.ranks import Ranks
from nanogpt.rundir import RunDir


def test_auto_ranks_are_gpus_or_one():
    assert preflight.plan_ranks(ServeConfig(), gpus=0) == 1
    assert preflight.plan_ranks(ServeConfig(), gpus=4) == 4
    assert preflight.plan_ranks(ServeConfig(device="cpu"), gpus=4) == 1
    assert preflight.plan_ranks(ServeConfig(ranks=3), gpus=0) == 3


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(StartupError, match="2 GPUs"):
        preflight.plan_ranks(ServeConfig(ranks=4), gpus=2)
    with pytest.raises(StartupError, match="--device cpu"):
        preflight.plan_ranks(ServeConfig(device="cuda"), gpus=0)


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0,1,3", 3), ("-1", 0)])
def test_visible_devices_count(visible, count):
    assert preflight.count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_weights_that_cannot_fit_are_refused(monkeypatch):
    models = [("shakespeare-char", str(PROJECT / "nanogpt/weights/shakespeare-char"))]
    config = ServeConfig(dtype="float32")
    monkeypatch.setattr(process, "available_memory", lambda: 100 * 2**20)
    preflight.check_memory(config, models, ranks=2)  # 41 MiB each
    with pytest.raises(StartupError, match=r"too little memory.*fewer ranks"):
        preflight.check_memory(config, models, ranks=3)


def test_port_in_use_and_foreign_host_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*--port"):
            preflight.check_port("127.0.0.1", port, "--port")
    preflight.check_port("127.0.0.1", port, "--port")
    with pytest.raises(StartupError, match="host"):
        preflight.check_port("no such host", port, "--port")


def test_a_check_that_dies_without_a_word_refuses_the_reload(monkeypatch, tmp_path):
    """It raised IndexError for want of a last line (the OOM killer leaves none), which ended the
    launcher, and with it the server that the reload was to leave alone."""
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nkill -KILL $$\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(preflight, "plan", lambda config: 1)
    with pytest.raises(StartupError, match="-9"):
        preflight.plan_reload([], options.parse([]), wait_for)


def test_a_check_that_does_not_end_refuses_the_reload(monkeypatch, tmp_path):
    """Of weights on a disk that hangs."""
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(preflight, "plan", lambda config: 1)
    monkeypatch.setattr(preflight, "CHECK_S", 1.0)
    with pytest.raises(StartupError, match="was ended"):
        preflight.plan_reload([], options.parse([]), wait_for)
    pid = int((tmp_path / "pid").read_text())
    assert wait_for(10, lambda: process.reap() or (not process.stat(pid) or None))


def wait_for(seconds, function):
    deadline = time.monotonic() + seconds
    while (found := function()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "m",
    "MASTER_PORT": "1",
}


def test_ranks_count_through_node_zero_first():
    """A bare torchrun may call node 1's processes 0 and 1: ours are numbered by node."""
    assert Ranks.from_environment(TORCHRUN, node=0, nnodes=2).rank == 1
    assert Ranks.from_environment(TORCHRUN, node=1, nnodes=2).rank == 3
    with pytest.raises(StartupError, match="4 processes"):
        Ranks.from_environment(TORCHRUN, node=0, nnodes=1)


def test_ranks_whose_torchrun_knows_one_node_meet_at_the_endpoint():
    one = {**TORCHRUN, "WORLD_SIZE": "2"}
    ranks = Ranks.from_environment(one, node=1, nnodes=3, endpoint="[fd00::1]:29500")
    assert (ranks.rank, ranks.world_size) == (3, 6)
    assert (ranks.store_host, ranks.store_port) == ("fd00::1", 29500)
    alone = Ranks.from_environment(one, node=0)
    assert (alone.world_size, alone.store_host) == (2, "m")


def test_the_interface_towards_an_address():
    assert network.interface_towards("127.0.0.1") == "lo"
    assert network.interface_towards("127.8.8.8") == "lo"
    with pytest.raises(StartupError, match=r"no way to nowhere\.invalid"):
        preflight.interface(ServeConfig(nnodes=2, rdzv_endpoint="nowhere.invalid:1"))


def test_without_torchrun_the_error_says_so():
    with pytest.raises(StartupError, match="torchrun"):
        Ranks.from_environment({}, node=0)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_RUN_DIR", str(tmp_path / "run"))
    return RunDir.open("127.0.0.1", 1)


def test_run_directory_is_private(run_dir):
    assert run_dir.path.stat().st_mode & 0o777 == 0o700
    run_dir.path.chmod(0o755)
    with pytest.raises(StartupError, match="private"):
        RunDir.open("127.0.0.1", 1)


def test_run_directory_too_long_for_sockets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_RUN_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(StartupError, match="too long"):
        RunDir.open("127.0.0.1", 1)


def test_lock_is_held_by_one_process_and_ends_with_it(run_dir):
    code = (
        "import sys, time; from nanogpt.rundir import RunDir; d = RunDir.open('127.0.0.1', 1)\n"
        "print(d.lock('x'), flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    assert run_dir.holder("x") == holder.pid
    assert not run_dir.lock("x")
    holder.kill()
    holder.communicate()
    assert run_dir.holder("x") is None
    assert run_dir.lock("x")


def test_marks_last_until_cleared(run_dir):
    assert run_dir.fatal() is None
    run_dir.set_fatal("why")
    run_dir.set_stopping()
    assert run_dir.fatal() == "why"
    assert run_dir.is_stopping()
    run_dir.clear_marks()
    assert run_dir.fatal() is None
    assert not run_dir.is_stopping()


SLEEP = "import time; time.sleep(60)"


def test_terminate_kills_what_ignores_sigterm():
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); " + SLEEP
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    child.stdout.readline()
    process.terminate(child.pid, 0.2)
    assert child.wait(5) == -signal.SIGKILL
    child.stdout.close()


def test_terminate_wakes_who_is_stopped_meanwhile():
    code = (
        "import os, signal, sys\n"
        "def end(*_):\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, end); print(1, flush=True); {SLEEP}"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    child.stdout.readline()
    process.terminate(child.pid, 30.0)
    assert child.wait(5) == 0
    child.stdout.close()


def test_terminate_waits_for_those_who_outlive_the_leader_of_their_group(tmp_path):
    done = tmp_path / "done"
    code = (
        "import os, time\n"
        "if os.fork():\n"
        f"    print(1, flush=True); {SLEEP}\n"
        f"time.sleep(1); open({str(done)!r}, 'w')"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    leader.stdout.readline()
    leader.kill()
    leader.wait()
    process.terminate(leader.pid, 30.0)
    assert done.exists()
    leader.stdout.close()


def test_child_dies_with_its_parent():
    """Also when the parent is killed so that it can't clean up."""
    child = (
        f"import os; from nanogpt import process; process.die_with_parent(os.getppid()); {SLEEP}"
    )
    parent = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"print(c.pid, flush=True); {SLEEP}"
    )
    outer = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(outer.stdout.readline())
    time.sleep(0.3)  # let it reach die_with_parent; too early, it finds its parent gone
    outer.kill()
    outer.communicate()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_available_memory_is_plausible():
    assert (
        2**20
        < process.available_memory()
        <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def test_a_configuration_is_read_from_a_copy_that_stays(run_dir, tmp_path, monkeypatch):
    """Also that which a variable names. What runs from an earlier one may start again any time."""
    file = tmp_path / "config.toml"
    file.write_text("ranks = 1\n")
    config = options.parse(["--config", str(file)])
    launcher = launch.Launcher(config, run_dir, ["--config", str(file)])
    first, second = (options.parse(launcher._keep_options()) for _ in range(2))
    assert first == second == config
    monkeypatch.setenv("NANOGPT_CONFIG", str(file))
    by_variable = launch.Launcher(config, run_dir, [])._keep_options()
    file.write_text("what = 1\n")
    assert options.parse(by_variable) == config
    assert len(list(run_dir.path.glob("config-0-*.toml"))) == 3
    run_dir.forget_configs(0)
    assert not list(run_dir.path.glob("config-0-*.toml"))


def test_a_configuration_that_can_be_read_only_once_is_refused(run_dir):
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(StartupError, match="more than once"):
        run_dir.keep_config(Path(f"/dev/fd/{read}"), 0, 1)
    os.close(read)
