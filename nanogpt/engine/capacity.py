"""How much fits: the arithmetic of weights, KV and concurrent contexts.

A token's keys and values take 2 * n_layer * n_embd numbers, whatever the head size: 36 KiB for
gpt2 and 300 KiB for gpt2-xl in half precision.
"""

from typing import NamedTuple

from nanogpt.engine.kv_cache import DEFAULT_BLOCK_SIZE, blocks_per_context
from nanogpt.registry import ModelCard


class Capacity(NamedTuple):
    """What one model on one device has room for. Sizes are bytes."""

    weights: int
    kv: int  # for keys and values, whole blocks only
    per_token: int
    per_context: int  # a full one
    contexts: int  # full ones that run at once
    tokens: int  # of contexts of any length, shared prompts counted once


def capacity(
    card: ModelCard,
    *,
    memory: int,
    item_bytes: int = 2,
    share: float = 0.85,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Capacity:
    """What `memory` bytes hold when a model is alone on a device: KV gets `share` of what its
    weights leave; the rest is for activations and libraries. Numbers take `item_bytes` each. When
    the weights don't fit, the answer has sizes only."""
    weights = card.parameters * item_bytes
    per_token = 2 * card.shape.n_layer * card.shape.n_embd * item_bytes
    per_block = per_token * block_size
    blocks = int(max(0, memory - weights) * share) // per_block
    full = blocks_per_context(card.context, block_size)
    return Capacity(
        weights=weights,
        kv=blocks * per_block,
        per_token=per_token,
        per_context=full * per_block,
        contexts=blocks // full,
        tokens=blocks * block_size,
    )
