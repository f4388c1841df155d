"""Where figures were measured: without it they mean nothing."""

import os
import platform
import shutil
import subprocess
from importlib import metadata

import msgspec

from nanogpt.config import PROJECT

MIB = 2**20


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int  # that this process may use
    memory_mib: int
    gpus: list[str]
    python: str
    torch: str
    revision: str  # of this repository; with a plus sign when files differ from it


def this_machine() -> Machine:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=pages * page // MIB,
        gpus=_lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        python=platform.python_version(),
        torch=metadata.version("torch"),
        revision=_revision(),
    )


def _cpu_name() -> str:
    """The first "model name", and what it does not say: family and model."""
    found: dict[str, str] = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _revision() -> str:
    revision = _lines("git", "-C", str(PROJECT), "rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    changed = _lines("git", "-C", str(PROJECT), "status", "--porcelain", "--untracked-files=no")
    return revision[0] + ("+" if changed else "")


def _lines(*command: str) -> list[str]:
    """What the command prints; nothing when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []
