"""Servers that a benchmark starts, waits for, and leaves nothing of."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanogpt import process
from nanogpt.bench.connection import ConnectionLost, Url
from nanogpt.bench.target import get
from nanogpt.errors import StartupError

POLL_S = 0.2
STOP_S = 60.0  # ours gives accepted requests 30 s
LOG_LINES = 5


class ManagedServer:
    """A shell command that serves at `url` until it is stopped. Its output goes to a file."""

    def __init__(
        self,
        name: str,
        command: str,
        url: str,
        *,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        stop_s: float = STOP_S,
    ) -> None:
        self._stop_s = stop_s
        self.name, self._url = name, Url.parse(url)
        self._log = tempfile.NamedTemporaryFile(prefix=f"bench-{name}-", suffix=".log")  # noqa: SIM115
        variables = {**os.environ, **(environ or {})}
        self._process = process.start_below(command, variables, cwd=cwd, output=self._log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> bytes:
        """All that it has printed."""
        return Path(self._log.name).read_bytes()

    def wait(self, timeout_s: float, api_key: str = "") -> None:
        """Until it lists its models or calls itself ready. Raises StartupError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise StartupError(f"{self.name} ended with exit code {code}: {self._last_words()}")
            if self._answers(api_key):
                return
            time.sleep(POLL_S)
        raise StartupError(
            f"{self.name} was not ready at {self._url} after {timeout_s:g} s: {self._last_words()}"
        )

    def _answers(self, api_key: str) -> bool:
        """It lists models, and has no word against it: llama-server lists its model while it still
        reads it (/health is 503), and ours what it could load (/ready is)."""
        try:
            if any(get(self._url.root, path).status == 503 for path in ("/health", "/ready")):
                return False
            reply = get(self._url, "/models", api_key)
        except ConnectionLost:
            return False
        return reply.status == 200 and b'"id"' in reply.body

    def _last_words(self) -> str:
        text = self.output().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-LOG_LINES:]) or "it printed nothing"

    def cpu_s(self, word: str = "") -> float:
        """CPU seconds that its living processes have taken so far; only of those with the word in
        their command line."""
        pids = [self._process.pid, *process.pids_below(self._process.pid)]
        return sum(
            process.cpu_seconds(pid)
            for pid in pids
            if word in " ".join(process.strings(pid, "cmdline"))
        )

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for whatever is left after a while."""
        below = process.descendants(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._stop_s)
        for pidfd in below:
            if not process.has_ended(pidfd, max(0.0, deadline - time.monotonic())):
                process.kill(pidfd)
            os.close(pidfd)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def stopping(servers: list[ManagedServer]) -> Iterator[None]:
    """Whatever happens, the servers that are in the list by then are stopped."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
