"""The processes of a cluster, found in /proc: who is who, and what they hold."""

import os
from typing import NamedTuple

from nanogpt import process

PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class Member(NamedTuple):
    """A live process. `role`: launcher, torchrun, parent 0 (of rank 0), rank 0, master
    (gunicorn's), worker, other."""

    pid: int
    parent: int
    role: str


def members(launcher: int) -> list[Member]:
    """The launcher and everything below it."""
    found = [Member(launcher, os.getpid(), "launcher")]
    for pid in process.pids_below(launcher):
        parent, command = _parent(pid), process.strings(pid, "cmdline")
        if parent is not None and command:
            found.append(Member(pid, parent, _role(pid, command)))
    roles = {m.pid: m.role for m in found}
    return [m._replace(role=_below(m.role, roles.get(m.parent, ""))) for m in found]


def _below(role: str, parents_role: str) -> str:
    """A child that was forked has its parent's command line: who it is shows in whose it is."""
    if role == parents_role == "master":
        return "worker"
    if role.startswith("parent") and role == parents_role:
        return role.replace("parent", "rank")
    return role


def _role(pid: int, command: list[str]) -> str:
    if "nanogpt.agent" in command:
        return "torchrun"
    names = [os.path.basename(part) for part in command[:3]]
    if "frontend.py" in names:
        return "master"
    if "rank_worker.py" in names:
        rank = next(
            (v for v in process.strings(pid, "environ") if v.startswith("LOCAL_RANK=")), "=?"
        )
        return f"parent {rank.partition('=')[2]}"
    return "other"


def holding(variable: str) -> list[str]:
    """Live processes whose environment has this "NAME=value", as "pid command"."""
    found = []
    for pid in process.pids():
        is_other = pid != os.getpid()
        if is_other and variable in process.strings(pid, "environ") and _state(pid) != "Z":
            found.append(f"{pid} {' '.join(process.strings(pid, 'cmdline'))[:80]}")
    return found


def rss_mib(pid: int) -> float | None:
    """Resident memory; None when the process is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * PAGE_MIB
    except (FileNotFoundError, ProcessLookupError):
        return None


def open_files(pid: int) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def _parent(pid: int) -> int | None:
    fields = process.stat(pid)
    return int(fields[1]) if fields else None


def _state(pid: int) -> str:
    fields = process.stat(pid)
    return fields[0] if fields else "Z"
