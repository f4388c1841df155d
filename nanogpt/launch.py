"""Runs one node of the cluster: checks what can be checked at once, then torchrun, until the end.

This process is what the operator sees. It ends with 0 after Ctrl-C or SIGTERM, and then nothing is
left behind; with 2 and one clear line when the cluster can't start. torchrun is started anew, with
growing pauses, if it ends by itself. SIGHUP has the ranks reload their configuration and models.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from nanogpt import log as logging_setup
from nanogpt import options, preflight, process
from nanogpt.cluster.keeper import LOCK, OWNER_VARIABLE
from nanogpt.config import PROJECT, ServeConfig
from nanogpt.errors import StartupError
from nanogpt.network import split_endpoint
from nanogpt.rundir import RunDir

log = logging.getLogger("launch")

DRAIN_MARGIN_S = 5.0  # beyond drain_s, for the front end to notice and leave
STOP_S = 5.0  # for torchrun to end its ranks; then they are killed
MAX_PAUSE_S = 30.0
LONG_LIFE_S = 10.0  # a torchrun that lived so long is started again at once
LOOK_EVERY_S = 1.0  # for processes that are stopped
LAUNCHER_LOCK = "launcher"

T = TypeVar("T")


class Torchrun:
    """torchrun and, below it, this node's ranks."""

    def __init__(self, config: ServeConfig, ranks: int, argv: Sequence[str]) -> None:
        # Each node has a torchrun of its own; node 0's has the store in which all ranks meet.
        has_store = config.nnodes > 1 and config.node_rank == 0
        endpoint = config.rdzv_endpoint if has_store else "127.0.0.1:0"
        self._command = [
            sys.executable,
            "-m",
            "nanogpt.agent",
            "--nnodes=1",
            f"--nproc-per-node={ranks}",
            "--rdzv-backend=own",  # see agent.py
            f"--rdzv-endpoint={endpoint}",
            "--rdzv-id=nanogpt",
            f"--max-restarts={config.cluster.max_restarts}",
            str(PROJECT / "rank_worker.py"),
            *argv,
        ]
        self._environ = {
            **os.environ,
            OWNER_VARIABLE: str(os.getpid()),
            "OMP_NUM_THREADS": os.environ.get(
                "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks))
            ),
        }
        if interface := preflight.interface(config):
            self._environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = process.start_below(self._command, self._environ)

    def pids(self) -> list[int]:
        """Of it and of all below it."""
        if self._process is None:
            return []
        return [self._process.pid, *process.pids_below(self._process.pid)]

    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """End torchrun and its ranks; kill what does not end in time."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("torchrun did not end in %.0f s: killed", STOP_S)
            self._process.kill()
            self._process.wait()


class Launcher:
    """The life of one node."""

    def __init__(self, config: ServeConfig, run_dir: RunDir, given: Sequence[str]) -> None:
        """`given`: the operator's options, from which `config` came. Raises StartupError."""
        self._given, self._run_dir = given, run_dir
        self._config, self._configs = config, 0  # how many copies there have been
        self._copied = ("", "")  # the latest copy, and what the operator calls that file
        argv = self._keep_options()
        self._config = options.parse(argv)
        preflight.check_fixed(self._config, config)
        self._torchrun = Torchrun(self._config, preflight.plan(self._config), argv)
        # What a reload has replaced: it had been ready, and its successor has not yet.
        self._before: tuple[ServeConfig, Torchrun] | None = None
        self._started = 0.0  # when torchrun was; time.monotonic()
        self._start_at: float | None = None  # when it will be again
        self._pause_s = 0.0
        self._stop_asked = self._reload_asked = False
        self._stopped: dict[int, float] = {}  # processes, and since when
        self._look_at = 0.0

    def _keep_options(self) -> list[str]:
        """Options with a copy of the file as it is now, whatever becomes of it: every process that
        starts later reads it again."""
        file = options.config_file(self._given)
        if file is None:
            return [*self._given]
        self._configs += 1
        copy = str(self._run_dir.keep_config(Path(file), self._config.node_rank, self._configs))
        self._copied = copy, file
        return [*self._given, "--config", copy]

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_stop)
        # In a terminal it means that the terminal has gone.
        signal.signal(signal.SIGHUP, self._ask_stop if os.isatty(0) else self._ask_reload)
        process.adopt_orphans()
        self._start()
        try:
            while not self._stop_asked:
                if self._run_dir.fatal() is not None and not self._go_back():
                    return 2  # the process that found it has said so on stderr
                if self._run_dir.is_started():
                    self._before = None
                if self._reload_asked and self._may_reload():
                    self._reload()
                self._tend()
                time.sleep(process.POLL_S)
            return 0
        finally:
            self._end()

    def _may_reload(self) -> bool:
        """Not before all ranks are ready: should it fail, there would be nothing to go back to."""
        return self._run_dir.is_started() or self._config.nnodes > 1

    def _start(self) -> None:
        self._start_at, self._started = None, time.monotonic()
        try:
            self._torchrun.start()
        except OSError as error:  # too many processes, or no memory: that may pass
            log.error("can't start torchrun: %s", error.strerror)
            self._start_at = self._started + MAX_PAUSE_S

    def _tend(self) -> None:
        """What must go on, whatever else this process waits for."""
        now = time.monotonic()
        if self._torchrun.has_ended() and self._start_at is None:
            lived_s = now - self._started
            longer = min(2 * self._pause_s + 1, MAX_PAUSE_S)
            self._pause_s = 0.0 if lived_s > LONG_LIFE_S else longer
            self._start_at = now + self._pause_s
            log.error("torchrun ended: starting it again in %.0f s", self._pause_s)
        if self._start_at is not None and now >= self._start_at:
            self._start()
        process.reap()
        self._kill_stopped(now)

    def _kill_stopped(self, now: float) -> None:
        """Kill torchrun, and processes below it, that don't run: they would restart nobody. The
        front end is let alone, since it holds connections; stopped ranks are mostly found sooner
        by it (nanogpt/cluster/watch.py), but not before they have joined."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        stopped = [pid for pid in self._torchrun.pids() if process.is_stopped(pid)]
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}
        watchdog_s = self._config.cluster.watchdog_s
        overdue = [pid for pid, since in self._stopped.items() if now - since >= watchdog_s]
        front_end = self._run_dir.holder(LOCK) if overdue else None
        for pid in overdue:
            with contextlib.suppress(ProcessLookupError):  # it went on, and ended
                if os.getpgid(pid) != front_end:  # which leads its group
                    log.error("process %d is stopped: killed", pid)
                    os.kill(pid, signal.SIGKILL)

    def _ask_reload(self, number: int, frame: FrameType | None) -> None:
        self._reload_asked = True

    def _reload(self) -> None:
        """Start the ranks anew with the configuration as it is now, once the front end has nothing
        that runs: see nanogpt/cluster/hold.py. One that could not start changes nothing."""
        self._reload_asked = False
        try:
            argv = self._keep_options()
            config, ranks = preflight.plan_reload(argv, self._config, self._wait_for)
            torchrun = Torchrun(config, ranks, argv)
        except StartupError as error:
            log.error("not reloaded: %s", str(error).replace(*self._copied))
            return
        log.info("reloading: what runs finishes first, what is new waits")
        self._run_dir.ask_reload()
        patience_s = self._config.http.drain_s + DRAIN_MARGIN_S
        self._wait_for(patience_s, lambda: self._run_dir.is_held() or None)
        if self._stop_asked:
            return
        before = (self._config, self._torchrun)
        self._replace(config, torchrun)
        self._before = before

    def _replace(self, config: ServeConfig, torchrun: Torchrun) -> None:
        self._torchrun.stop()
        self._run_dir.begin_again()
        self._config, self._torchrun = config, torchrun
        self._start()
        self._run_dir.end_reload()

    def _go_back(self) -> bool:
        """What a reload brought can't start, though the check had found nothing. Returns whether
        there is something to go back to."""
        if self._before is None:
            return False
        log.error("the new configuration can't start: going back to the one before")
        self._replace(*self._before)
        self._before = None
        self._run_dir.set_started()  # it had been ready
        return True

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_asked = True

    def _wait_for(self, seconds: float, function: Callable[[], T | None]) -> T | None:
        """What the function gives, once that is not None; None after this time, or when the server
        is to end."""
        end = time.monotonic() + seconds
        while (found := function()) is None and not self._stop_asked and time.monotonic() < end:
            self._tend()
            time.sleep(process.POLL_S)
        return found

    def _end(self) -> None:
        """First the front end, so that accepted requests finish; then the ranks."""
        self._run_dir.set_stopping()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        pid = self._run_dir.holder(LOCK)
        if pid is not None and self._stop_asked:
            process.terminate(pid, self._config.http.drain_s + DRAIN_MARGIN_S, self._tend)
        elif pid is not None:
            process.terminate(pid, DRAIN_MARGIN_S)
        self._torchrun.stop()
        for pidfd in process.descendants(os.getpid()):
            process.kill(pidfd)
            os.close(pidfd)


def main(argv: list[str]) -> int:
    config = options.parse_or_exit(argv)
    if config.role == "web":  # nothing to launch: this process becomes the web server
        os.execv(sys.executable, [sys.executable, str(PROJECT / "frontend.py"), *argv])
    logging_setup.set_up(config.log_level, "launcher")
    try:
        run_dir = RunDir.open(config.host, config.port)
        if config.node_rank == 0:
            preflight.check_port(config.host, config.port, "--port")
            if config.nnodes > 1:
                preflight.check_port(*split_endpoint(config.rdzv_endpoint), "--rdzv-endpoint")
        if not run_dir.lock(f"{LAUNCHER_LOCK}-{config.node_rank}"):
            raise StartupError(f"another launcher is running on {config.host}:{config.port}")
        run_dir.clear_marks()
        run_dir.forget_configs(config.node_rank)
        launcher = Launcher(config, run_dir, argv)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return launcher.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
