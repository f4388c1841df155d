"""Keeps a rank alive: a parent that has imported everything forks it, and forks another when it
dies.

Importing torch takes longer than all else that a rank does before its first token, so a rank is
not started from nothing after a crash, but forked from a process that never does anything else:
it has no threads and no sockets. torchrun watches this parent, and starts both anew if it dies.

The parent also kills a child that hangs: one whose loop does not turn, or that a signal has
stopped. The front end's watch (watch.py) is for what no parent sees: a machine that went silent.
"""

import gc
import logging
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from nanogpt import process
from nanogpt.cluster.suspicion import is_fault

log = logging.getLogger(__name__)

TICK_S = 0.5
OWN_PAUSE_S = 2.0  # between two ticks: this process itself was stopped, or starved
OOM_WINDOW_S = 10.0  # in which the kernel's count of OOM kills rises for a child that it killed
# Deaths in a row, at the start or by a fault, without a token in between: the first are bad luck,
# more are a reason to wait.
FREE_DEATHS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
MOST_DEATHS = 10  # then everything starts from nothing, should the fault be in this process
NO_USE = 2  # exit code of a rank that another one would share
# They stand for a SIGKILL: of the kernel for want of memory, and of the parent for a hang.
OUT_OF_MEMORY, STUCK = 137, 124

_TIME = struct.Struct("d")


class Patience(NamedTuple):
    """Seconds after which a child is killed: with a loop that does not turn, and stopped."""

    stuck_s: float
    stopped_s: float


class Life:
    """What parent and child tell each other. `before`: how the latest child that was in a group
    ended, as an exit code or the negative number of a signal; 0 when there was none."""

    def __init__(self) -> None:
        # That the child was of use; that it is in a group; from byte 8 on, when its loop turned.
        self._shared = mmap.mmap(-1, 16)
        self.before = 0

    def mark(self) -> None:
        """The child has brought something forth."""
        self._shared[0] = 1

    def take(self) -> bool:
        """Whether it had, since this was last asked."""
        marked, self._shared[0] = self._shared[0] == 1, 0
        return marked

    def join(self) -> None:
        """The child is in a group."""
        self._shared[1] = 1

    @property
    def has_group(self) -> bool:
        return self._shared[1] == 1

    def turn(self) -> None:
        """The child's loop turns."""
        _TIME.pack_into(self._shared, 8, time.monotonic())

    def idle_s(self) -> float:
        """Seconds since it last did; 0 before it did at all."""
        turned: float = _TIME.unpack_from(self._shared, 8)[0]
        return time.monotonic() - turned if turned else 0.0

    def begin(self) -> None:
        """Another child is about to start."""
        self._shared[1] = 0
        _TIME.pack_into(self._shared, 8, 0.0)


def pause_after(deaths: int) -> float:
    """Seconds to wait after so many deaths in a row."""
    extra = deaths - FREE_DEATHS
    return 0.0 if extra <= 0 else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (extra - 1))


def keep_alive(
    life: Life, patience: Patience, work: Callable[[], int], tick: Callable[[], bool]
) -> int:
    """Run `work` in a forked child, again and again. `tick` is called twice a second meanwhile, and
    says whether it is time to go; a child that is left dies with this process.

    Returns an exit code when another child would be of no use.
    """
    gc.collect()
    gc.freeze()  # what is here stays: a collection in the child must not copy its pages
    deaths = 0
    while True:
        code = _run(life, patience, work, tick)
        if code is None:
            return 0
        if code == NO_USE:
            return code
        if life.has_group:  # else it ended by nothing that a request has done
            life.before = code
        # One that was ready, and was killed, is nobody's fault: operators may do so all day.
        was_well = life.has_group and not is_fault(code)
        deaths = 1 if life.take() or was_well else deaths + 1
        if deaths > MOST_DEATHS:
            log.error("%d ranks in a row came to nothing: starting anew", deaths)
            return 1
        pause = pause_after(deaths)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code == OUT_OF_MEMORY:
            how = "killed by the kernel: the machine is out of memory"
        log.error("the rank died (%s): another one starts%s", how, f" in {pause} s" * bool(pause))
        end = time.monotonic() + pause
        while time.monotonic() < end:
            if tick():
                return 0
            time.sleep(min(TICK_S, max(0.0, end - time.monotonic())))


class _OomKills:
    """Whether the kernel has killed anything for want of memory just now."""

    def __init__(self) -> None:
        self._counts = [process.oom_kills()] * 2  # OOM_WINDOW_S ago or more, and later
        self._looked_at = time.monotonic()

    def look(self, now: float) -> None:
        """Call often."""
        if now - self._looked_at > OOM_WINDOW_S:
            self._counts = [self._counts[1], process.oom_kills()]
            self._looked_at = now

    def have_risen(self) -> bool:
        return process.oom_kills() > self._counts[0]


def _run(
    life: Life, patience: Patience, work: Callable[[], int], tick: Callable[[], bool]
) -> int | None:
    """One child, from fork to end; its exit code, or the negative number of its signal. None when
    it is time to go."""
    life.begin()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            process.die_with_parent(parent)
            code = work()
        except Exception:
            log.critical("the rank failed", exc_info=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    stuck = killed = False
    oom_kills = _OomKills()
    running_at = awake_at = ticked_at = time.monotonic()
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        while not poll.poll(TICK_S * 1000):
            if tick():
                return None
            now = time.monotonic()
            oom_kills.look(now)
            if now - ticked_at > OWN_PAUSE_S:  # the child may have been frozen as well
                running_at = awake_at = now
            ticked_at = now
            if killed:  # it ends once the kernel lets it
                continue
            if not process.is_stopped(pid):
                running_at = now
            stuck = min(life.idle_s(), now - awake_at) > patience.stuck_s
            if stuck or now - running_at > patience.stopped_s:
                log.error("the rank hangs (%s): killed", "in a step" if stuck else "stopped")
                process.kill(pidfd)
                killed = True
    finally:
        os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGKILL and oom_kills.have_risen():
        return OUT_OF_MEMORY
    return STUCK if code == -signal.SIGKILL and stuck else code
