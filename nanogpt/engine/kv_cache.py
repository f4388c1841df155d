"""How many KV blocks fit: from bytes to blocks and back."""

import torch

from nanogpt.engine.attention import kv_bytes_per_block
from nanogpt.model.gpt import GPTConfig

DEFAULT_BLOCK_SIZE = 16  # tokens


def num_kv_blocks_for(
    memory_bytes: int,
    config: GPTConfig,
    dtype: torch.dtype,
    block_size: int = DEFAULT_BLOCK_SIZE,
    device: torch.device | str = "cpu",
) -> int:
    """Blocks that fit into `memory_bytes` (0 if not even one does)."""
    return memory_bytes // kv_bytes_per_block(config, block_size, dtype, device)


def blocks_per_context(context_length: int, block_size: int = DEFAULT_BLOCK_SIZE) -> int:
    """Blocks of one full context: the least that an engine's pool may have."""
    return -(-context_length // block_size)
