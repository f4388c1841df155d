"""Paged attention in plain torch for a CPU without the kernels: slower, as reproducible.

torch's attention gives a row other bits in another shape. So every row is computed in one shape
that depends on its position alone: with the 16 positions that it falls among, of which those that
aren't wanted now are zeros, over that many keys, rounded up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.engine.attention import AttentionMetadata, TorchBackend

QUERY_TILE, KEY_TILE = 16, 64


class TiledBackend(TorchBackend):
    """The cache of TorchBackend; attention in tiles that start at fixed positions."""

    name = "torch-tiled"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        self.write(k.to(key.dtype), v.to(value.dtype), key, value, meta)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        row = 0
        for count in meta.host_counts:
            start = int(meta.positions[row])
            table = meta.block_tables[int(meta.sequence_of[row])]
            keys, values = (_gather(c, table, start + count).to(q.dtype) for c in (key, value))
            for first in range(start // QUERY_TILE * QUERY_TILE, start + count, QUERY_TILE):
                begin, end = max(first, start), min(first + QUERY_TILE, start + count)
                rows = slice(row + begin - start, row + end - start)
                tile = q.new_zeros(QUERY_TILE, *q.shape[1:])
                tile[begin - first : end - first] = q[rows]
                y = _attend_tile(tile, first, keys, values)
                out[rows] = y[begin - first : end - first]
            row += count
        return out


def _gather(cache: Tensor, table: Tensor, count: int) -> Tensor:
    """The first `count` keys or values of a block table, then zeros: (T, n_head, hs)."""
    block_size = cache.size(1)
    tokens = cache[table[: -(-count // block_size)].long()].flatten(0, 1)[:count]
    return F.pad(tokens, (0, 0, 0, 0, 0, _padded(count) - count))


def _padded(count: int) -> int:
    last_tile = -(-count // QUERY_TILE) * QUERY_TILE
    return -(-last_tile // KEY_TILE) * KEY_TILE


def _attend_tile(tile: Tensor, first: int, keys: Tensor, values: Tensor) -> Tensor:
    """Queries at positions first .. first+15, over the keys that these can see: (16, nh, hs)."""
    length = _padded(first + QUERY_TILE)
    seen = torch.arange(length) <= torch.arange(first, first + QUERY_TILE)[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (tile, keys[:length], values[:length]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)
