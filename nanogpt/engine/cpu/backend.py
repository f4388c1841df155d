"""The C++ attention kernel as a backend of nanogpt/engine/attention.py."""

import torch
from torch import Tensor

from nanogpt.engine.attention import AttentionMetadata
from nanogpt.model.gpt import GPTConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 16  # keys side by side in the key cache: one AVX-512 register of floats


class CPUBackend:
    """Paged attention in C++ (see attention.h): rows are the same to the bit in every batch."""

    name = "cpu"

    def empty_cache(
        self,
        config: GPTConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Keys (n_layer, num_blocks, n_head, tiles, head_size, 16), values (..., 16, padded)."""
        if block_size % TILE:
            raise ValueError(f"block_size {block_size} is not a multiple of {TILE}")
        padded = -(-config.head_size // TILE) * TILE
        # In memory a head's blocks are neighbours; see attention.h. Nothing reads a slot that
        # was never written, so the system hands out each page when it is first used.
        heads = (config.n_layer, config.n_head, num_blocks, block_size // TILE)
        keys = torch.empty(*heads, config.head_size, TILE, dtype=dtype, device=device)
        values = torch.empty(*heads, TILE, padded, dtype=dtype, device=device)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        return torch.ops.nanogpt_cpu.paged_attention(
            q, k, v, key, value, meta.positions, meta.slots, meta.block_tables, meta.sequence_of
        )
