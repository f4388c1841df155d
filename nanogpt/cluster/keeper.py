"""Rank 0's parent starts the front end, and starts another when it is gone."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from nanogpt.config import PROJECT
from nanogpt.errors import StartupError
from nanogpt.rundir import RunDir

log = logging.getLogger(__name__)

LOCK = "frontend"
OWNER_VARIABLE = "NANOGPT_OWNER_PID"  # the process with which everything ends
CHECK_S = 0.5
_MIN_LIFE_S = 2.0  # a front end that lives shorter is not replaced sooner than this


class FrontEndKeeper:
    """Keeps one front end alive. It has a session of its own, so a restart of the ranks, which
    kills rank 0's process group, leaves it and its open connections alone."""

    def __init__(self, run_dir: RunDir, argv: Sequence[str], owner_pid: int) -> None:
        self._run_dir = run_dir
        self._command = [
            sys.executable,
            str(PROJECT / "frontend.py"),
            *argv,
        ]
        self._environ = {**os.environ, OWNER_VARIABLE: str(owner_pid)}
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._checked = 0.0

    def ensure(self) -> None:
        """Start a front end if none is alive. Raises StartupError when the first can't start."""
        now = time.monotonic()
        if now - self._checked < CHECK_S:
            return
        self._checked = now
        code = self._child.poll() if self._child else None
        if code == 2 and not self._run_dir.is_started():  # it has said why on stderr
            raise StartupError(self._run_dir.fatal() or "the front end can't start")
        running = self._child is not None and code is None
        if running or self._run_dir.is_stopping() or self._run_dir.holder(LOCK) is not None:
            return
        if now - self._started < _MIN_LIFE_S:
            return
        if self._started:
            log.error("the front end is gone (exit code %s): starting another", code)
        self._started = now
        self._child = subprocess.Popen(
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
