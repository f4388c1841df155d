"""How many choices are in progress, and on which rank each of them is counted."""

import threading
from collections.abc import Collection
from typing import NamedTuple

from nanogpt.cluster.placement import Placement
from nanogpt.errors import Unavailable, too_many_choices


class Place(NamedTuple):
    """Where the choices of a request are: their owners, and who counts these."""

    placement: Placement
    owners: tuple[int, ...]


class Intake:
    """Thread-safe. A choice counts from `take` until `release`."""

    def __init__(self, max_outstanding: int) -> None:
        self._max_outstanding = max_outstanding
        self._placement = Placement(1)
        self._lock = threading.Lock()
        self.outstanding = 0

    def begin(self, world_size: int) -> None:
        """Another group is there: what comes is placed on its ranks."""
        with self._lock:
            self._placement = Placement(world_size)

    def is_current(self, placement: Placement) -> bool:
        return placement is self._placement

    def take(self, total: int, finished: Collection[int]) -> Place:
        """Accept `total` choices, some of which may be finished. Raises InvalidRequest when they
        are more than may ever be, Unavailable when they are too many now."""
        count = total - len(finished)
        if count > self._max_outstanding:
            raise too_many_choices(count, self._max_outstanding)
        with self._lock:
            if self.outstanding + count > self._max_outstanding:
                raise Unavailable(
                    f"{self.outstanding} choices are in progress, the limit is "
                    f"{self._max_outstanding}; try again soon"
                )
            self.outstanding += count
            return Place(self._placement, self._placement.place(total, tuple(finished)))

    def place_again(self, total: int, finished: Collection[int]) -> Place:
        """The same choices on the ranks of the present group."""
        with self._lock:
            return Place(self._placement, self._placement.place(total, tuple(finished)))

    def release(self, place: Place, indices: Collection[int]) -> None:
        """These choices are over."""
        with self._lock:
            place.placement.release(place.owners[i] for i in indices)
            self.outstanding -= len(indices)
