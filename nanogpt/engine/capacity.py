"""How much fits: the arithmetic of weights, KV and concurrent contexts.

A token's keys and values take 2 * n_layer * n_embd numbers, whatever the head size: 36 KiB for
gpt2 and 300 KiB for gpt2-xl in half precision.
"""

from typing import NamedTuple

import torch

from nanogpt.engine.kv_cache import DEFAULT_BLOCK_SIZE, blocks_per_context
from nanogpt.model.gpt import GPTConfig

# OpenAI's four, as on the hub: the shapes that cards don't have.
GPT2_SHAPES = {
    name: GPTConfig(
        vocab_size=50257, n_layer=layers, n_head=heads, n_embd=width, activation="gelu_tanh"
    )
    for name, layers, heads, width in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}


class Capacity(NamedTuple):
    """What one model on one device has room for. Sizes are bytes."""

    weights: int
    kv: int  # for keys and values, whole blocks only
    per_token: int
    per_context: int  # a full one
    contexts: int  # full ones that run at once
    tokens: int  # of contexts of any length, shared prompts counted once


def capacity(
    config: GPTConfig,
    num_parameters: int,
    *,
    memory: int,
    dtype: torch.dtype = torch.float16,
    share: float = 0.85,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Capacity:
    """What `memory` bytes hold when a model is alone on a device: KV gets `share` of what its
    weights leave; the rest is for activations and libraries. When the weights don't fit, the
    answer has sizes only."""
    weights = num_parameters * dtype.itemsize
    per_token = 2 * config.n_layer * config.n_embd * dtype.itemsize
    per_block = per_token * block_size
    blocks = int(max(0, memory - weights) * share) // per_block
    full = blocks_per_context(config.block_size, block_size)
    return Capacity(
        weights=weights,
        kv=blocks * per_block,
        per_token=per_token,
        per_context=full * per_block,
        contexts=blocks // full,
        tokens=blocks * block_size,
    )
