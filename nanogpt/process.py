"""What the operating system can do for a process of the cluster. Linux only."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
POLL_S = 0.05  # between two looks at processes
_below: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()  # of `start_below`
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when process `parent`, its parent, ends.

    Ends at once if the parent is gone already.
    """
    if _libc().prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def start_below(
    command: Sequence[str] | str,
    environ: Mapping[str, str],
    *,
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that gets SIGTERM when the calling thread ends, in a session of its own, so
    that a terminal's Ctrl-C is for this process to pass on. A string is a shell's command. `output`
    takes what it prints; without it, that goes where ours goes."""
    parent = os.getpid()
    child = subprocess.Popen(
        command,
        shell=isinstance(command, str),
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(parent, signal.SIGTERM),
    )
    _below.add(child)
    return child


def abandon(child: subprocess.Popen[bytes]) -> None:
    """Kill a child of `start_below`, and leave it to `reap`: on a disk that hangs it may take its
    time to end."""
    child.kill()
    _below.discard(child)
    child.returncode = -signal.SIGKILL


def adopt_orphans() -> None:
    """Have every process below this one whose parent ends become a child of this one."""
    if _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap() -> None:
    """Collect children that have ended, but for those of `start_below`: who has started them waits
    for them."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        ours = {child.pid for child in _below if child.returncode is None}
        if ended is None or ended.si_pid in ours:
            return
        os.waitpid(ended.si_pid, 0)


def keep_freed_memory() -> None:
    """Have malloc keep what is freed instead of giving it back to the kernel.

    A step's temporaries are megabytes; returned and taken anew each time they cost a page fault
    for every 4 KiB (measured: 6 ms a step for 6 MB).
    """
    mallopt = _libc().mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 256 * 2**20)


def give_back_memory() -> None:
    """Return to the kernel what malloc keeps of freed memory (see `keep_freed_memory`)."""
    _libc().malloc_trim(0)


def spin_briefly() -> None:
    """Have idle OpenMP threads spin for tens of microseconds only. Call before torch is imported.

    The default spins for milliseconds between products: when anything else wants the core (the
    front end does), the others wait for a thread that does not run. Not to spin at all costs a
    wake-up for each product of a small model. Figures in dev/LOG.md, "Spinning OpenMP threads".
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def no_blas_threads() -> None:
    """Have numpy's BLAS make no threads. Call before numpy is imported, in a process that forks."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    values = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if (bound := _number(limit)) is not None and (taken := _number(used)) is not None:
            values.append(max(0, bound - taken))
    return min(values)


def _meminfo(name: str) -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key == name:
                return int(rest.split()[0]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")


def _number(path: str) -> int | None:
    """The number in the file; None when there is none ("max", or no such file)."""
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def open_pidfd(pid: int) -> int | None:
    """A descriptor of the process, whatever becomes of its pid; None when it is gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def has_ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Whether the process has ended, or ends within `timeout_s`."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def kill(pidfd: int) -> None:
    """SIGKILL the process, if it still is there."""
    with contextlib.suppress(ProcessLookupError):  # it has ended: that is what was wanted
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def terminate(leader: int, timeout_s: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """SIGTERM to the leader of a process group, then SIGKILL to the whole group when not all of it
    has ended in time. When the leader has died, the others are waited for all the same; who is
    stopped goes on. `meanwhile` is called many times a second."""
    deadline = time.monotonic() + timeout_s
    members = [pid for pid in pids() if stat(pid)[2:3] == [str(leader)]]
    group = [pidfd for pid in members if (pidfd := open_pidfd(pid)) is not None]
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
        while not (ended := all(map(has_ended, group))) and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGCONT)  # after it: else it would take new work first
            meanwhile()
            time.sleep(POLL_S)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
            for pidfd in group:
                has_ended(pidfd, 1.0)
    finally:
        for pidfd in group:
            os.close(pidfd)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, since the machine started."""
    with open("/proc/vmstat") as file:
        counts = [line.split()[1] for line in file if line.startswith("oom_kill ")]
    return int(counts[0]) if counts else 0


def pids() -> list[int]:
    """Of all processes that are there."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command: state, parent and so on; empty when the
    process is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 when it is gone."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def strings(pid: int, name: str) -> list[str]:
    """What /proc/PID/cmdline or /proc/PID/environ has; empty when the process is gone, or another
    user's."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return [part.decode(errors="replace") for part in file.read().split(b"\0") if part]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP) or a debugger keeps the process from running."""
    return stat(pid)[:1] in (["T"], ["t"])


def pids_below(pid: int) -> list[int]:
    """All processes below `pid`, parents before their children."""
    children: dict[int, list[int]] = {}
    for each in pids():
        if fields := stat(each):
            children.setdefault(int(fields[1]), []).append(each)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def descendants(pid: int) -> list[int]:
    """Open pidfds of all processes below `pid`; the caller closes them."""
    opened = map(open_pidfd, pids_below(pid))
    return [pidfd for pidfd in opened if pidfd is not None]
