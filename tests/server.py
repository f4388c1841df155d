"""Starts the real server, as its operator does, and stops it."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil

from nanogpt.network import free_port

ROOT = Path(__file__).resolve().parent.parent
# Each token past the context takes a prompt's time: seconds of generation, on any machine.
SLIDING = {"max_tokens": 320, "extra_body": {"past_context": "crop"}}
READY_S = 120  # a busy machine may take long; a test never waits for this when all is well


class Server:
    """A running ./launch.sh. `output` is all that it and its processes have printed. `within` is
    what runs it on another machine (see nodes.py)."""

    def __init__(
        self,
        *options: str,
        environ: dict[str, str] | None = None,
        host: str = "",
        port: int | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        self.port, self._host = port or free_port(), host or "127.0.0.1"
        listen = ("--host", host) if host else ()
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._jobs = tempfile.TemporaryDirectory(prefix="nanogpt-jobs-")
        self.process = subprocess.Popen(
            [
                *(*within, str(ROOT / "launch.sh"), *listen, "--port", str(self.port)),
                *("--device", "cpu", *options),
            ],
            cwd=tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Neither the keys, bans and jobs of whoever runs the tests, nor ours for them.
            env={
                **os.environ,
                "NANOGPT_ADMISSION_STATE": ":memory:",
                "NANOGPT_JOBS_PATH": self._jobs.name,
                **(environ or {}),
            },
        )

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def wait_for(self, pattern: str, count: int = 1) -> str:
        """The line of output in which the pattern is found for the `count`-th time."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            found = [line for line in self.output.splitlines() if re.search(pattern, line)]
            if len(found) >= count:
                return found[count - 1]
            assert self.process.poll() is None, f"ended: {self.output}"
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in: {self.output}")

    def client(self, **settings) -> openai.OpenAI:
        defaults = {"api_key": "none", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**defaults, **settings})

    def below(self) -> list[psutil.Process]:
        """Every process below the launcher."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, by rank: each is the child of a process that torchrun started."""
        found = {}
        for process in self.below():
            with contextlib.suppress(psutil.Error):
                if _is_rank_worker(process) and _is_rank_worker(process.parent()):
                    found[int(process.environ()["LOCAL_RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the launcher and wait for its end. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """Leave nothing behind, also after a test that failed."""
        left = []
        if self.process.poll() is None:
            left = self.below()
            self.process.kill()
            self.process.wait()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._log.close()
        self._jobs.cleanup()


def _is_rank_worker(process: psutil.Process) -> bool:
    return any(part.endswith("rank_worker.py") for part in process.cmdline()[:3])


@contextlib.contextmanager
def serving(
    *options: str, environ: dict[str, str] | None = None, within: tuple[str, ...] = ()
) -> Iterator[Server]:
    """A server that is ready."""
    server = Server(*options, environ=environ, within=within)
    try:
        server.wait_for("^ready: ")
        yield server
    finally:
        server.close()
