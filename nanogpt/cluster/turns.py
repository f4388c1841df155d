"""Whose turn it is: models that have work at once get equal time, whatever their steps take."""

from collections.abc import Collection


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996, section 2), over seconds of steps: the
    model that has had least goes first, and one that was idle has no claim for that time."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}  # seconds, of each that had work the last time
        self._now = 0.0  # what the one whose turn it was last had had

    def choose(self, names: Collection[str]) -> str:
        """One of those that have work now."""
        self._had = {name: max(self._had.get(name, 0.0), self._now) for name in names}
        chosen = min(names, key=self._had.__getitem__)
        self._now = self._had[chosen]
        return chosen

    def charge(self, name: str, seconds: float) -> None:
        """Its step took so long."""
        self._had[name] += seconds
