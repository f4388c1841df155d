"""The cluster that a run breaks: started as an operator would, in a run directory of its own."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from nanogpt import process
from nanogpt.chaos import processes
from nanogpt.chaos.processes import Member
from nanogpt.config import PROJECT
from nanogpt.network import free_port

READY_S = 180.0
STOP_S = 90.0  # beyond the drain
HOOKS = Path(__file__).with_name("hooks")
_LOADED = re.compile(r" on cpu, ([\d.]+) s$", re.M)


class ClusterError(Exception):
    """The cluster did not come up, or did not go on."""


class ChaosCluster:
    """A launcher and everything below it."""

    def __init__(self, ranks: int, directory: Path, settings: Mapping[str, str]) -> None:
        self.port = free_port()
        self.log = directory / "cluster.log"
        self._mark = f"NANOGPT_RUN_DIR={directory / 'run'}"
        self._command = [
            *(sys.executable, "-m", "nanogpt.launch", "--device", "cpu"),
            *("--port", str(self.port), "--ranks", str(ranks)),
        ]
        self._environ = {
            **os.environ,
            "NANOGPT_RUN_DIR": str(directory / "run"),
            "NANOGPT_ADMISSION_STATE": ":memory:",
            "NANOGPT_JOBS_PATH": str(directory / "jobs"),
            "PYTHONPATH": os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")]),
            **settings,
        }
        self._launcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Call from the main thread: the cluster ends with the thread that started it."""
        with self.log.open("ab") as log:
            self._launcher = process.start_below(
                self._command, self._environ, cwd=PROJECT, output=log
            )

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        assert self._launcher is not None
        return self._launcher

    def wait_ready(self, after_epoch: int = 0, timeout_s: float = READY_S) -> int:
        """Wait for an epoch after this one, and return it. Raises ClusterError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            code = self.launcher.poll()
            if code is not None:
                raise ClusterError(f"the launcher ended with {code}: see {self.log}")
            epoch = self.epoch()
            if epoch > after_epoch:
                return epoch
            time.sleep(0.02)
        raise ClusterError(f"not ready after {timeout_s:.0f} s: see {self.log}")

    def epoch(self) -> int:
        """The epoch that takes requests; 0 when none does."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()
        return int(answer["epoch"]) if answer["ready"] else 0

    def members(self) -> list[Member]:
        return processes.members(self.launcher.pid)

    def pids(self, role: str) -> list[int]:
        """Processes of a role; "rank" stands for all ranks."""
        return [m.pid for m in self.members() if m.role == role or m.role.split()[0] == role]

    def wait_for(self, role: str) -> list[int]:
        """As `pids`, once there are any. Raises ClusterError."""
        deadline = time.monotonic() + READY_S
        while not (found := self.pids(role)):
            if time.monotonic() > deadline:
                raise ClusterError(f"no {role} for {READY_S:.0f} s: see {self.log}")
            time.sleep(0.02)
        return found

    def wait_ended(self, pids: Collection[int]) -> None:
        """Until none of these is below the launcher any more. Raises ClusterError."""
        deadline = time.monotonic() + READY_S
        while left := set(pids) & set(process.pids_below(self.launcher.pid)):
            if time.monotonic() > deadline:
                raise ClusterError(f"{left} did not end in {READY_S:.0f} s: see {self.log}")
            time.sleep(0.02)

    def log_size(self) -> int:
        return self.log.stat().st_size

    def loading_s(self, since: int) -> float:
        """The slowest loading of the models that the log tells of after byte `since`."""
        with self.log.open("rb") as file:
            file.seek(since)
            times = _LOADED.findall(file.read().decode(errors="replace"))
        return max(map(float, times), default=0.0)

    def ask_stop(self) -> None:
        """SIGTERM to the launcher; may be called again."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM to the launcher; its exit code. A launcher that hangs is killed."""
        self.ask_stop()
        try:
            return self.launcher.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            return self.launcher.wait()

    def left_behind(self, patience_s: float = 5.0) -> list[str]:
        """Processes of this cluster that are still there."""
        deadline = time.monotonic() + patience_s
        while (found := processes.holding(self._mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found
