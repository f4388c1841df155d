"""Which rank generates which choice."""

from collections.abc import Iterable, Sequence


class Placement:
    """Spreads choices over ranks by what each has outstanding.

    Load is counted in choices: a decode step costs a rank about the same whatever the length of
    its sequences. Ties go to the lowest rank, so an idle cluster of R ranks hands choice j to
    rank j modulo R, and n below R uses n ranks.
    """

    def __init__(self, world_size: int) -> None:
        self._load = [0] * world_size

    @property
    def load(self) -> tuple[int, ...]:
        """Outstanding choices of each rank."""
        return tuple(self._load)

    def place(self, count: int, finished: Sequence[int] = ()) -> tuple[int, ...]:
        """Owners of `count` choices, counted as outstanding until `release`.

        Choices listed in `finished` get an owner, since every choice has one, but no load.
        """
        done = frozenset(finished)
        owners = []
        for index in range(count):
            rank = min(range(len(self._load)), key=self._load.__getitem__)
            owners.append(rank)
            if index not in done:
                self._load[rank] += 1
        return tuple(owners)

    def release(self, owners: Iterable[int]) -> None:
        """The choices with these owners are no longer outstanding."""
        for rank in owners:
            self._load[rank] -= 1
            assert self._load[rank] >= 0, "released more than was placed"
