"""Commits of this repository as servers: each in a folder of its own, with the present Python."""

import io
import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from nanogpt.bench.managed import ManagedServer
from nanogpt.config import PROJECT
from nanogpt.errors import ConfigError, StartupError
from nanogpt.network import free_port

HERE = "."  # stands for the files as they are


def names(revisions: Sequence[str]) -> list[str]:
    """Short names for tables, all different. Raises ConfigError for what is no commit."""
    found: list[str] = []
    for revision in revisions:
        name = "here" if revision == HERE else _git("rev-parse", "--short=8", revision)
        while name in found:  # a commit against itself shows the noise
            name += "'"
        found.append(name)
    return found


def check_out(revision: str, name: str, folder: Path) -> Path:
    """The commit's files, with its C++ kernels built. Returns where they are."""
    if revision == HERE:
        return PROJECT
    path = folder / name
    archive = subprocess.run(
        ["git", "-C", str(PROJECT), "archive", "--format=tar", revision], capture_output=True
    )
    if archive.returncode:
        raise ConfigError(f"git archive {revision}: {archive.stderr.decode().strip():.200}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(path, filter="data")
    build_kernels(name, path)
    return path


def build_kernels(name: str, path: Path) -> None:
    """They are not in the repository. Raises StartupError."""
    if not (path / "nanogpt" / "engine" / "cpu" / "build.py").exists():
        return
    print(f"{name}: building its kernels", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt.engine.cpu.build"],
        cwd=path,
        env=environ(path),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise StartupError(f"{name}: the kernels can't be built: {done.stderr.strip()[-300:]}")


def environ(path: Path) -> dict[str, str]:
    """The variables of this process, but for which project Python finds first."""
    return {**os.environ, "PYTHONPATH": str(path)}


def launch(name: str, path: Path, options: str) -> tuple[ManagedServer, str]:
    """A server of these files on a free port, and its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = f"exec {shlex.quote(sys.executable)} -m nanogpt.launch --port {port} {options}"
    return ManagedServer(name, command, url, cwd=path, environ=environ(path)), url


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{arguments[-1]!r:.60} is no commit of {PROJECT}")
    return done.stdout.strip()
