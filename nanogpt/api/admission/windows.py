"""Sliding windows: how much was taken over the last seconds, and when there is room again.

A window counts in `SLOTS` slots. What is taken counts from its moment until its whole slot is a
full window old, so no interval of that length ever holds more than the limit; the price is that
room comes back up to one slot (a sixtieth of the window) late. Memory of a window is bounded by
its slots, whatever its limit is and however large a single cost.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from nanogpt.api.admission.clock import Clock

SLOTS = 60
WINDOW_S = 60.0  # of the limits per minute


class Name(NamedTuple):
    """Which window. One of a key (user "") is kept for good: there are as many as keys."""

    kind: str  # "requests", "tokens"
    key: str
    user: str


class Claim(NamedTuple):
    """A wish to take `cost` from a window that holds `limit` (both 0 or more)."""

    name: Name
    limit: int
    cost: int


class Level(NamedTuple):
    """How full a window is."""

    name: Name
    limit: int
    used: int
    reset_s: float  # until it is empty, when nothing more is taken

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used)


class Full(NamedTuple):
    """A claim that was refused, and how long until it fits when nobody else takes."""

    claim: Claim
    wait_s: float


class Taken(NamedTuple):
    """What was taken, and where: needed to give some of it back."""

    claims: tuple[Claim, ...]
    slot: int
    shared: bool = False  # in Redis, not in this process


class Windows(Protocol):
    """Many windows of the same length. Thread-safe."""

    def take(self, claims: Sequence[Claim]) -> Taken | Full:
        """All of the claims, or none. A cost over its own limit never fits: don't ask."""

    def give_back(self, taken: Taken, amount: int) -> None:
        """Undo `amount` of each claim, where it still counts."""

    def levels(self, claims: Sequence[Claim]) -> list[Level]:
        """The present state of each; costs don't matter."""


class Window:
    """Parallel lists, oldest first: slot numbers, and what was taken in each.

    Slot k lasts from k * slot_s to (k + 1) * slot_s on its owner's clock.
    """

    __slots__ = ("amounts", "slots", "used")

    def __init__(self, slots: Sequence[int] = (), amounts: Sequence[int] = ()) -> None:
        self.slots, self.amounts = list(slots), list(amounts)
        self.used = sum(amounts)

    def forget_before(self, slot: int) -> None:
        old = 0
        while old < len(self.slots) and self.slots[old] < slot:
            self.used -= self.amounts[old]
            old += 1
        if old:
            del self.slots[:old], self.amounts[:old]

    def add(self, slot: int, amount: int) -> None:
        if not amount:
            return
        if self.slots and self.slots[-1] == slot:
            self.amounts[-1] += amount
        else:
            self.slots.append(slot)
            self.amounts.append(amount)
        self.used += amount

    def subtract(self, slot: int, amount: int) -> None:
        if slot in self.slots:
            at = self.slots.index(slot)
            amount = min(amount, self.amounts[at])
            self.amounts[at] -= amount
            self.used -= amount

    def frees(self, excess: int, slot_s: float) -> float:
        """When `excess` (at most what is used) will have come back, on the owner's clock."""
        for slot, amount in zip(self.slots, self.amounts, strict=True):
            excess -= amount
            if excess <= 0:
                return (slot + SLOTS + 1) * slot_s
        raise AssertionError("more is to be freed than was taken")


def longest_wait(
    claims: Sequence[Claim], windows: Sequence[Window], slot_s: float, now: float
) -> Full | None:
    """Of the claims that don't fit, the one that takes longest to."""
    full = [
        Full(claim, window.frees(window.used + claim.cost - claim.limit, slot_s) - now)
        for claim, window in zip(claims, windows, strict=True)
        if window.used + claim.cost > claim.limit
    ]
    return max(full, key=lambda refused: refused.wait_s, default=None)


def level(claim: Claim, window: Window, slot_s: float, now: float) -> Level:
    reset_s = window.frees(window.used, slot_s) - now if window.used else 0.0
    return Level(claim.name, claim.limit, window.used, reset_s)


class MemoryWindows:
    """Windows of this process. Those of users are bounded: the least recently used one goes."""

    def __init__(self, clock: Clock, seconds: float, max_users: int) -> None:
        self._clock, self._slot_s, self._max_users = clock, seconds / SLOTS, max_users
        self._of_keys: dict[Name, Window] = {}
        self._of_users: OrderedDict[Name, Window] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._of_keys) + len(self._of_users)

    def take(self, claims: Sequence[Claim]) -> Taken | Full:
        with self._lock:
            now = self._clock.monotonic()
            slot = int(now // self._slot_s)
            windows = [self._window(claim.name, slot) for claim in claims]
            full = longest_wait(claims, windows, self._slot_s, now)
            if full is not None:
                return full
            for claim, window in zip(claims, windows, strict=True):
                window.add(slot, claim.cost)
            return Taken(tuple(claims), slot)

    def give_back(self, taken: Taken, amount: int) -> None:
        with self._lock:
            for claim in taken.claims:
                window = self._find(claim.name)
                if window is not None:
                    window.subtract(taken.slot, min(amount, claim.cost))

    def levels(self, claims: Sequence[Claim]) -> list[Level]:
        with self._lock:
            now = self._clock.monotonic()
            levels = []
            for claim in claims:
                window = self._find(claim.name) or Window()
                window.forget_before(int(now // self._slot_s) - SLOTS)
                levels.append(level(claim, window, self._slot_s, now))
            return levels

    def clear(self, name: Name) -> None:
        """Empty this window."""
        with self._lock:
            self._of_keys.pop(name, None)
            self._of_users.pop(name, None)

    def _find(self, name: Name) -> Window | None:
        return self._of_users.get(name) if name.user else self._of_keys.get(name)

    def _window(self, name: Name, slot: int) -> Window:
        """The window of this name, made if need be."""
        window = self._find(name) or Window()
        if name.user:
            self._of_users[name] = window
            self._of_users.move_to_end(name)
            if len(self._of_users) > self._max_users:
                self._of_users.popitem(last=False)
        else:
            self._of_keys[name] = window
        window.forget_before(slot - SLOTS)
        return window
