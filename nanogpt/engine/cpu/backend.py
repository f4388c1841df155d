"""The C++ attention kernel as a backend of nanogpt/engine/attention.py."""

import torch
from torch import Tensor

from nanogpt.engine.attention import AttentionMetadata
from nanogpt.model.gpt import GPTConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 16  # keys side by side in the key cache: one AVX-512 register of floats


class CPUBackend:
    """Paged attention in C++ (see attention.cpp): rows are the same to the bit in every batch."""

    name = "cpu"
    reads_unwritten = False

    def cache_shapes(
        self, config: GPTConfig, num_blocks: int, block_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if block_size % TILE:
            raise ValueError(f"block_size {block_size} is not a multiple of {TILE}")
        blocks = (config.n_layer, num_blocks, config.n_head, block_size // TILE)
        padded = -(-config.head_size // TILE) * TILE
        return (*blocks, config.head_size, TILE), (*blocks, TILE, padded)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        return torch.ops.nanogpt_cpu.paged_attention(
            q, k, v, key, value, meta.positions, meta.slots, meta.block_tables, meta.sequence_of
        )
