"""The random stream of a choice: a pure function of seed, prompt, choice and position."""

import numpy as np


def stream_key(seed: int, prompt_i: int, choice_j: int) -> np.ndarray:
    """The 128 bits (2,) uint64 that choose a choice's stream: those of two choices never meet."""
    return np.array([seed & (2**64 - 1), (prompt_i << 32) | choice_j], dtype=np.uint64)


def uniforms(seed: int, prompt_i: int, choice_j: int, count: int) -> np.ndarray:
    """The first `count` uniforms of a choice's stream, float64 in [0, 1); one for each position.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). A longer row
    begins with the shorter one, so a resumed choice draws what it would have drawn. The C++
    sampler computes the same numbers one by one (nanogpt/engine/cpu/sampling.cpp).
    """
    key = stream_key(seed, prompt_i, choice_j)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
