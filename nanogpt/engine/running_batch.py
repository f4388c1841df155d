"""The arrays of a decode batch, kept from step to step.

Most steps compute one token each of the same sequences as the step before. Then positions and
slots grow by one, and a block table changes only where a sequence enters a block, every
`block_size` tokens; nothing else is made anew. After a network has been through the caches each
call of NumPy or torch costs 5 to 10 us, so what counts is how few there are.
"""

import numpy as np
import torch
from torch import Tensor

from nanogpt.engine.attention import AttentionMetadata
from nanogpt.engine.scheduler import Chunk
from nanogpt.engine.transfer import to_device

SPARE_BLOCKS = 8  # columns of the block tables that the first step doesn't need yet


class RunningBatch:
    """N sequences of which a step computes one token each. On the host; shapes as in packing.py."""

    def __init__(self, chunks: list[Chunk], block_size: int) -> None:
        """For chunks of one token each."""
        self.seqs = [chunk.seq for chunk in chunks]
        self._block_size, self._num_steps = block_size, 0
        starts = [chunk.start for chunk in chunks]
        self._max_keys = max(starts) + 1
        self._entering: list[list[int]] = [[] for _ in range(block_size)]
        for row, start in enumerate(starts):  # by the steps after which a row enters a block
            self._entering[-start % block_size].append(row)
        width = -(-self._max_keys // block_size) + SPARE_BLOCKS
        self._tables = np.zeros((len(chunks), width), np.int32)
        for row, seq in enumerate(self.seqs):
            blocks = seq.block_table[:width]  # it may have more, which no step reaches so far
            self._tables[row, : len(blocks)] = blocks
        tokens = [seq.tokens[start] for seq, start in zip(self.seqs, starts, strict=True)]
        self._numbers = np.array([starts, starts, tokens], np.int64)
        self._positions, self._slots, self._token_ids = self._numbers
        rows = np.arange(len(chunks), dtype=np.int32)
        self._slots %= block_size
        self._slots += (
            self._tables[rows, self._positions // block_size].astype(np.int64) * block_size
        )
        self._query_counts = [1] * len(chunks)
        self._arrays = (self._token_ids, self._positions, self._slots, self._tables, rows)
        self._tensors = [torch.from_numpy(array) for array in self._arrays]

    def advance(self) -> bool:
        """Move on to the next token of each sequence, in place; False if a new batch is needed."""
        size = self._block_size
        if self._max_keys == self._tables.shape[1] * size:
            return False
        self._max_keys += 1
        self._num_steps += 1
        self._numbers += 1
        self._token_ids[:] = [seq.tokens[-1] for seq in self.seqs]
        for row in self._entering[self._num_steps % size]:
            index = int(self._positions[row]) // size
            block = self.seqs[row].block_table[index]
            self._tables[row, index] = block
            self._slots[row] = block * size
        return True

    def to(self, device: torch.device) -> tuple[Tensor, AttentionMetadata]:
        """Token ids (N,) and metadata of this step; on a CPU valid until the next one."""
        tensors = self._tensors
        if device.type != "cpu":
            tensors = [to_device(array, device) for array in self._arrays]
        token_ids, positions, slots, tables, rows = tensors
        return token_ids, AttentionMetadata(
            positions, slots, tables, rows, self._query_counts, self._max_keys
        )
