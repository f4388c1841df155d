"""Finds the request that kills the engines, so that the others live on.

A group that dies takes the blame to every request that it had, until that one gets a new token: who
makes progress is not what the group died of. Suspects are then run one at a time, and who is there
alone when a group dies again is guilty.

A rank that dies by its own fault (an exception, a segmentation fault) says more than one that was
killed, since operators and the kernel kill as well, and a kill must never cost a request. So two
faults make a suspect, but it takes ten kills in a row without a single token.
"""

import signal
from collections.abc import Collection, Iterable
from typing import Protocol

FAULT, KILL = 5, 1  # blame for one death
SUSPECT = 10  # blame with which a request runs alone; if that dies too it is guilty

PEER_LOST = 3  # exit code of a rank whose only trouble is that another one is gone

_FAULTS = {
    -number
    for number in (
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSYS,
        signal.SIGTRAP,
    )
}


class Accused(Protocol):
    """A request, as far as this module minds it."""

    blame: int  # since its latest token

    @property
    def done(self) -> bool: ...


def is_fault(end: int) -> bool:
    """Whether a rank ended so by itself: exit codes are positive, signals negative."""
    return end in _FAULTS or (end > 0 and end != PEER_LOST)


def is_suspect(request: Accused) -> bool:
    return request.blame >= SUSPECT


class Suspicion:
    """Blames requests for the deaths of groups."""

    def __init__(self) -> None:
        self._present: list[Accused] = []

    def died(self, present: Iterable[Accused]) -> None:
        """A group is dead that had these requests."""
        self._present = list(present)

    def judge(self, ends: Collection[int]) -> Accused | None:
        """The guilty one, if there is one, once it is known how the ranks ended."""
        present = [request for request in self._present if not request.done]
        fault = any(map(is_fault, ends))
        self._present = []
        for request in present:
            request.blame += FAULT if fault else KILL
        if len(present) == 1 and is_suspect(present[0]):
            return present[0]
        return None
