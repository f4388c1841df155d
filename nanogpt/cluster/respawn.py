"""Keeps a rank alive: a parent that has imported everything forks it, and forks another when it
dies.

Importing torch takes longer than all else that a rank does before its first token, so a rank is
not started from nothing after a crash, but forked from a process that never does anything else:
it has no threads and no sockets. torchrun watches this parent, and starts both anew if it dies.
"""

import gc
import logging
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable

from nanogpt import process

log = logging.getLogger(__name__)

TICK_S = 0.5
# Deaths in a row without a token in between: the first are bad luck, more a reason to wait.
FREE_DEATHS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
MOST_DEATHS = 10  # then everything starts from nothing, should the fault be in this process
NO_USE = 2  # exit code of a rank that another one would share
OUT_OF_MEMORY = 137  # stands for a SIGKILL that came from the kernel for want of memory


class Life:
    """What parent and child tell each other. `before`: how the child before this one ended, as an
    exit code or the negative number of a signal; 0 for the first."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 2)  # that the child was of use; that it is in a group
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

    def begin(self) -> None:
        """Another child is about to start."""
        self._shared[1] = 0


def pause_after(deaths: int) -> float:
    """Seconds to wait after so many deaths in a row."""
    extra = deaths - FREE_DEATHS
    return 0.0 if extra <= 0 else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (extra - 1))


def keep_alive(life: Life, work: Callable[[], int], tick: Callable[[], bool]) -> int:
    """Run `work` in a forked child, again and again. `tick` is called twice a second meanwhile, and
    says whether it is time to go; a child that is left dies with this process.

    Returns an exit code when another child would be of no use.
    """
    gc.collect()
    gc.freeze()  # what is here stays: a collection in the child must not copy its pages
    deaths = 0
    while True:
        code = _run(life, work, tick)
        if code is None:
            return 0
        if code == NO_USE:
            return code
        life.before = code
        deaths = 1 if life.take() else deaths + 1
        if deaths > MOST_DEATHS:
            log.error("%d ranks in a row died before their first token: starting anew", deaths)
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


def _run(life: Life, work: Callable[[], int], tick: Callable[[], bool]) -> int | None:
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
    oom_kills = process.oom_kills()
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        while not poll.poll(TICK_S * 1000):
            if tick():
                return None
    finally:
        os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    was_oom = code == -signal.SIGKILL and process.oom_kills() > oom_kills
    return OUT_OF_MEMORY if was_oom else code
