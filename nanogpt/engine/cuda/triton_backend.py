"""The Triton kernels as a backend of nanogpt/engine/attention.py."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nanogpt.engine.attention import AttentionMetadata, TorchBackend
from nanogpt.engine.cuda import kernels

# Keys of a part, whatever the batch: where parts begin decides how sums are rounded.
SPLIT = 256
SINGLE, CHUNK, FIXED_TILE = 1, 64, 16  # rows of a tile
# A product that is fused with a sum is rounded once, not twice, and the compiler decides anew for
# each variant of a kernel: without fusion a part is the same in all of them.
FIXED = {"enable_fp_fusion": False}


class Launch(NamedTuple):
    """How the attention of tiles of a size is compiled."""

    keys: int  # a step
    num_warps: int
    num_stages: int


def launch_of(tile: int, dim: int, *, tensor_cores: bool) -> Launch:
    """Chosen by what the compiler says of registers and shared memory; not tuned on a GPU."""
    if tile == SINGLE:
        return Launch(keys=32, num_warps=2 if dim <= 64 else 4, num_stages=2)
    if not tensor_cores or dim > 64:
        return Launch(keys=32, num_warps=8 if tile == CHUNK else 4, num_stages=1)
    return Launch(keys=64, num_warps=4, num_stages=2)


class TritonBackend(TorchBackend):
    """Paged attention without gathering keys; the cache is TorchBackend's.

    Rows that are alone in their sequence (decode) are computed one by one, chunks of prompts in
    tiles on tensor cores: each is the same to the bit in any batch and any blocks, but the two
    kinds round differently. With `fixed_tiles` there is one kind only, so that a token is the same
    whether it was decoded, or prefilled in whatever chunks. Where fewer programs than
    `enough_programs` would decode, parts of the keys get programs of their own. `tensor_cores`:
    the GPU has some that Triton can use for half precision (compute capability 8.0 and later).
    """

    name = "triton"

    def __init__(
        self,
        *,
        fixed_tiles: bool = False,
        enough_programs: int = 256,
        tensor_cores: bool = True,
    ) -> None:
        self._fixed_tiles, self._enough_programs = fixed_tiles, enough_programs
        self._tensor_cores = tensor_cores

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        _store(k, v, key, value, meta.slots)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for size, tiles in self._tiles(meta):
            self._attend_tiles(q, key, value, out, tiles, size, meta)
        return out

    def _tiles(self, meta: AttentionMetadata) -> list[tuple[int, Tensor]]:
        if self._fixed_tiles:
            return [(FIXED_TILE, meta.tiles(FIXED_TILE))]
        kinds = ((SINGLE, meta.tiles(SINGLE, at_most=1)), (CHUNK, meta.tiles(CHUNK, at_least=2)))
        return [(size, tiles) for size, tiles in kinds if len(tiles)]

    def _attend_tiles(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        tiles: Tensor,
        size: int,
        meta: AttentionMetadata,
    ) -> None:
        """Fill the rows of `out` (N, n_head, hs) that the tiles consist of."""
        rows, heads, head_size = q.shape
        shape = {
            "HEADS": heads,
            "HEAD_SIZE": head_size,
            "TILE": size,
            "DIM": padded(head_size),
            "SPLIT": 0 if size == CHUNK else SPLIT,
        }
        tensor_cores = self._tensor_cores and q.dtype != torch.float32
        launch = launch_of(size, padded(head_size), tensor_cores=tensor_cores)
        parts = -(-meta.host_max_keys // SPLIT)
        if size == CHUNK or len(tiles) * heads >= self._enough_programs:
            parts = 1
        best, total, acc = _scratch(q, parts)
        kernels.attend[len(tiles), heads, parts](
            q,
            key,
            value,
            out,
            best,
            total,
            acc,
            tiles,
            meta.positions,
            meta.sequence_of,
            meta.block_tables,
            1 / (math.sqrt(head_size) * math.log(2)),  # exp2 of scaled scores is exp
            q.stride(0),
            q.stride(1),
            meta.block_tables.stride(0),
            rows,
            BLOCK_SIZE=key.size(1),
            KEYS=launch.keys,
            PARTS=parts > 1,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **shape,
            **FIXED,
        )
        if parts > 1:
            kernels.fold_parts[len(tiles), heads](
                out,
                best,
                total,
                acc,
                tiles,
                meta.positions,
                rows,
                num_warps=launch.num_warps,
                **shape,
                **FIXED,
            )


def padded(head_size: int) -> int:
    """The power of two that a kernel computes with: at least 16, which tensor cores need."""
    return max(16, triton.next_power_of_2(head_size))


def _scratch(q: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums (parts, N, n_head), weighted values (..., hs): next to none for one part."""
    rows, heads, head_size = q.shape if parts > 1 else (1, 1, 1)
    best, total = q.new_empty(2, parts, rows, heads, dtype=torch.float32)
    return best, total, q.new_empty(parts, rows, heads, head_size, dtype=torch.float32)


def _store(k: Tensor, v: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    rows, heads, head_size = k.shape
    kernels.store[rows,](
        k,
        v,
        key,
        value,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEADS=heads,
        HEAD_SIZE=head_size,
        WIDTH=triton.next_power_of_2(heads * head_size),
        num_warps=4,
    )
