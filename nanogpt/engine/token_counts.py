"""How often a choice has used which token: what the penalties look at."""

from collections.abc import Iterable

import numpy as np


class TokenCounts:
    """Distinct tokens of a choice and how often each was generated (prompt tokens count 0 times).

    Two parallel arrays, kept up to date token by token, so that a step pays for the distinct
    tokens only, never for the vocabulary or for the length of the text.
    """

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.empty(64, np.float32)
        for token_id in prompt:
            self._slot(token_id)
        for token_id in output:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """One more generated token."""
        slot = self._slot(token_id)  # may replace the arrays
        self._counts[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._slots)]

    def _slot(self, token_id: int) -> int:
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._slots[token_id] = len(self._slots)
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._ids[slot], self._counts[slot] = token_id, 0
        return slot
