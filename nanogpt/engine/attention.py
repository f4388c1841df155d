"""Attention over the paged KV cache: one interface, and a backend for each kind of machine.

A step packs the tokens of many sequences into N rows: chunks of prompts and single tokens alike.
Each row's key and value go to a slot of the cache, then the row attends to every token of its own
sequence up to itself, found through the sequence's block table:

    rows        a5 a6 a7 | b42 | c0 c1        positions   5 6 7 42 0 1
    sequence_of  0  0  0     1    2  2        slots       block_table[p // bs] * bs + p % bs

One algorithm serves prefill and decode, because a token is the same token in both. On a CPU a row's
answer is the same to the bit in whatever batch, chunk or blocks it is computed: with the C++ kernel
(nanogpt/engine/cpu), and more slowly with plain torch. On a GPU (nanogpt/engine/cuda) it is to
rounding, or to the bit where that is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.engine.transfer import to_device
from nanogpt.model.gpt import GPTConfig


class Span(NamedTuple):
    """Consecutive tokens of one sequence that a step computes: positions start .. end-1.

    `block_table` are the sequence's blocks in order, enough for all tokens up to the last of these.
    """

    start: int
    end: int
    block_table: Sequence[int]


@dataclass
class AttentionMetadata:
    """Where the N rows of a step belong. The tensors may be static ones, filled in place.

    `positions` (N,) int64, of each row in its sequence. `slots` (N,) int64, where its key and value
    go: block * block_size + offset. `block_tables` (S, max_blocks) int32, entries past a
    sequence's last block are never read as keys but must be valid blocks (0 will do).
    `sequence_of` (N,) int32, each row's row of `block_tables`. Rows of one sequence are adjacent
    and ascend in position. Sequences that begin with the same blocks should be adjacent: their
    common beginning is then read once for several of them, with the same answers to the bit.

    `query_counts` are the numbers of rows of the sequences in turn, and `max_keys` bounds the keys
    of any row; both live on the host, so that a backend can choose shapes without waiting for a
    device. They are found from the tensors when left out.
    """

    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    sequence_of: Tensor
    query_counts: Sequence[int] | None = None
    max_keys: int | None = None
    _tiles: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls, spans: Sequence[Span], block_size: int, device: torch.device | str = "cpu"
    ) -> "AttentionMetadata":
        """Metadata of a step that computes `spans`, packed in this order."""
        counts = torch.tensor([s.end - s.start for s in spans])
        starts = torch.tensor([s.start for s in spans])
        max_keys = max(s.end for s in spans)
        width = -(-max_keys // block_size)
        # A sequence may hold blocks that this step doesn't reach yet; no row needs them.
        rows = [list(s.block_table[:width]) for s in spans]
        tables = torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.int32)
        sequence_of = torch.repeat_interleave(counts)  # (N,)
        firsts = counts.cumsum(0) - counts  # the row at which each span begins
        positions = torch.arange(len(sequence_of)) + (starts - firsts)[sequence_of]
        blocks = tables[sequence_of, positions // block_size].long()
        return cls(
            positions=positions.to(device),
            slots=(blocks * block_size + positions % block_size).to(device),
            block_tables=tables.to(device),
            sequence_of=sequence_of.int().to(device),
            query_counts=counts.tolist(),
            max_keys=max_keys,
        )

    @cached_property
    def host_counts(self) -> list[int]:
        """Rows of each sequence in turn; waits for the device unless they were given."""
        if self.query_counts is not None:
            return list(self.query_counts)
        return self.sequence_of.unique_consecutive(return_counts=True)[1].tolist()

    @cached_property
    def host_max_keys(self) -> int:
        """The most keys of any row; waits for the device unless it was given."""
        return int(self.positions.max()) + 1 if self.max_keys is None else self.max_keys

    @cached_property
    def row_ends(self) -> Tensor:
        """(S + 1,) int32: 0, then the row after each sequence's last one."""
        counts = self.host_counts
        if max(counts) == 1:
            return torch.arange(len(counts) + 1, dtype=torch.int32, device=self.positions.device)
        ends = np.array([0, *counts]).cumsum().astype(np.int32)
        return to_device(ends, self.positions.device)

    @cached_property
    def key_counts(self) -> Tensor:
        """(S,) int32: how many keys the last row of each sequence attends to."""
        return (self.positions[self.row_ends[1:].long() - 1] + 1).int()

    def tiles(self, size: int, *, at_least: int = 1, at_most: int = 2**31) -> Tensor:
        """(T, 2) int32: first row and number of rows of each tile, when sequences of `at_least`
        to `at_most` rows are cut into tiles of `size` rows or fewer. Made once for all layers."""
        wanted = (size, at_least, at_most)
        if wanted not in self._tiles:
            self._tiles[wanted] = self._cut(*wanted)
        return self._tiles[wanted]

    def _cut(self, size: int, at_least: int, at_most: int) -> Tensor:
        counts, device = self.host_counts, self.positions.device
        if max(counts) == 1:  # made where it is used: a CUDA graph has no part on the host
            rows = torch.arange(len(counts) if at_least <= 1 else 0, device=device)
            return torch.stack([rows, torch.ones_like(rows)], 1).int()
        tiles, end = [], 0
        for count in counts:
            start, end = end, end + count
            if at_least <= count <= at_most:
                tiles += [(row, min(size, end - row)) for row in range(start, end, size)]
        return to_device(np.array(tiles, np.int32).reshape(-1, 2), device)


class AttentionBackend(Protocol):
    """How a device keeps keys and values, and attends to them. `key` and `value` are one layer."""

    name: str

    def empty_cache(
        self,
        config: GPTConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Key and value cache of all layers: (n_layer, num_blocks, ...) each."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        """Write k and v to their slots, then return the attended values; all (N, n_head, hs)."""


class TorchBackend:
    """Plain torch, for any device and type: gather a sequence's keys, then torch's own attention.

    Sequences with one row (decode) go through one padded call, longer ones (prefill) through one
    each. Answers agree with every other backend to rounding.
    """

    name = "torch"

    def empty_cache(
        self,
        config: GPTConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, each (n_layer, num_blocks, block_size, n_head, head_size)."""
        shape = (config.n_layer, num_blocks, block_size, config.n_head, config.head_size)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return keys, values

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        self.write(k, v, key, value, meta)
        counts = meta.host_counts
        if max(counts) == 1:
            return self._attend_single(q, key, value, meta, slice(None), meta.host_max_keys)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ends = torch.tensor(counts).cumsum(0)
        single = [int(end) - 1 for end, count in zip(ends, counts, strict=True) if count == 1]
        if single:
            rows = torch.tensor(single, device=q.device)
            out[rows] = self._attend_single(q, key, value, meta, rows, meta.host_max_keys)
        for end, count in zip(ends.tolist(), counts, strict=True):
            if count > 1:
                rows_of_one = slice(end - count, end)
                out[rows_of_one] = self._attend_chunk(q, key, value, meta, rows_of_one)
        return out

    @staticmethod
    def write(k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata) -> None:
        key.flatten(0, 1).index_copy_(0, meta.slots, k)
        value.flatten(0, 1).index_copy_(0, meta.slots, v)

    def _attend_single(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        meta: AttentionMetadata,
        rows: Tensor | slice,
        max_keys: int,
    ) -> Tensor:
        """Rows of different sequences, one each: (M, n_head, hs)."""
        tables = meta.block_tables[meta.sequence_of[rows].long()]  # (M, blocks)
        keys, values = self._gather(key, value, tables, max_keys)  # (M, nh, T, hs)
        seen = torch.arange(keys.size(-2), device=q.device) <= meta.positions[rows, None]
        _blank(keys, values, seen[:, None, :, None])
        y = F.scaled_dot_product_attention(
            q[rows].unsqueeze(2), keys, values, attn_mask=seen[:, None, None]
        )
        return y.squeeze(2)

    def _attend_chunk(
        self, q: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata, rows: slice
    ) -> Tensor:
        """Adjacent rows of one sequence: (M, n_head, hs)."""
        positions = meta.positions[rows]
        table = meta.block_tables[meta.sequence_of[rows.start].long()]
        keys, values = self._gather(key, value, table[None], meta.host_max_keys)
        seen = torch.arange(keys.size(-2), device=q.device) <= positions[:, None]
        _blank(keys, values, seen[-1, :, None])
        y = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], keys, values, attn_mask=seen
        )
        return y[0].transpose(0, 1)

    @staticmethod
    def _gather(key: Tensor, value: Tensor, tables: Tensor, max_keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values of whole block tables: each (M, n_head, T, hs)."""
        tables = tables[:, : -(-max_keys // key.size(1))].long()
        keys, values = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (key, value))
        return keys, values


def _blank(keys: Tensor, values: Tensor, used: Tensor) -> None:
    """Zeros in gathered slots that nobody attends to: a weight of zero times NaN would be NaN."""
    for gathered in (keys, values):
        gathered.masked_fill_(~used, 0)


def select_backend(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    *,
    head_size: int = 64,
    deterministic: bool = False,
) -> AttentionBackend:
    """The best backend for this device, type, block and head size. Chosen once, with the cache.

    On a CPU all but plain torch are deterministic; on a GPU that is chosen.
    """
    if device.type == "cuda":
        from nanogpt.engine.cuda.select import choose_backend

        return choose_backend(device, dtype, block_size, head_size, deterministic=deterministic)
    if device.type != "cpu":
        return TorchBackend()
    from nanogpt.engine.cpu import backend, library, plain

    fits = dtype in backend.DTYPES and block_size % backend.TILE == 0
    return backend.CPUBackend() if fits and library.load_kernels() else plain.TiledBackend()


@dataclass
class KVCache:
    """Keys and values of every layer, in blocks."""

    keys: Tensor  # (n_layer, num_blocks, ...), laid out as the backend likes
    values: Tensor
    block_size: int
    backend: AttentionBackend

    @property
    def num_blocks(self) -> int:
        return self.keys.size(1)

    def copy_block(self, source: int, target: int) -> None:
        """Copy all layers of a block onto another one (copy on write)."""
        self.keys[:, target].copy_(self.keys[:, source])
        self.values[:, target].copy_(self.values[:, source])


def allocate_kv_cache(
    config: GPTConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    backend: AttentionBackend | None = None,
    deterministic: bool = False,
) -> KVCache:
    """An empty cache of `num_blocks` blocks of `block_size` tokens, for the device's backend."""
    device = torch.device(device)
    backend = backend or select_backend(
        device, dtype, block_size, head_size=config.head_size, deterministic=deterministic
    )
    keys, values = backend.empty_cache(config, num_blocks, block_size, dtype, device)
    return KVCache(keys, values, block_size, backend)


def kv_bytes_per_block(
    config: GPTConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> int:
    """Bytes of one block of keys and values over all layers, as the device's backends keep them:
    but for CPUs' all of them do as TorchBackend does."""
    device = torch.device(device)
    backend = select_backend(device, dtype, block_size) if device.type == "cpu" else TorchBackend()
    caches = backend.empty_cache(config, 1, block_size, dtype, torch.device("meta"))
    return sum(cache.nbytes for cache in caches)


class PagedAttend:
    """The network's `Attend` (see nanogpt/model/gpt.py) over a paged cache, for one step.

    Holds no state of its own: make one for each step, or keep one with static metadata.
    """

    def __init__(self, cache: KVCache, metadata: AttentionMetadata) -> None:
        self.cache, self.metadata = cache, metadata

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        return cache.backend.attend(q, k, v, cache.keys[layer], cache.values[layer], self.metadata)
