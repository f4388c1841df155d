"""The random stream of a choice: a pure function of seed, prompt, choice and position."""

import numpy as np


def uniforms(seed: int, prompt_i: int, choice_j: int, count: int) -> np.ndarray:
    """The first `count` uniforms of a choice's stream, float64 in [0, 1); one for each position.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the 128-bit
    key (seed, prompt_i * 2**32 + choice_j): streams of different choices never meet, and a longer
    row begins with the shorter one, so a resumed choice draws what it would have drawn.
    """
    key = np.array([seed & (2**64 - 1), (prompt_i << 32) | choice_j], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
