"""A step's chunks as tensors: all their tokens behind one another in one row, without padding.

    chunks       a5 | b0 b1 b2 b3 | c9        one decode, a prompt's start, one decode
    rows          0    1  2  3  4    5        N = 6
    sequence_of   0    1  1  1  1    2

Built in NumPy, whole arrays at a time: a step of a small model takes about a millisecond.
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from nanogpt.engine.attention import AttentionMetadata
from nanogpt.engine.scheduler import Chunk
from nanogpt.engine.transfer import to_device


def pack(
    chunks: list[Chunk], block_size: int, device: torch.device
) -> tuple[Tensor, AttentionMetadata]:
    """Token ids (N,) int64 of the chunks in turn, and where their rows belong."""
    tokens = [*chain.from_iterable(c.seq.tokens[c.start : c.end] for c in chunks)]
    counts = np.array([c.end - c.start for c in chunks])
    starts = np.array([c.start for c in chunks])
    max_keys = max(c.end for c in chunks)
    tables = _block_tables(chunks, -(-max_keys // block_size))
    sequence_of = np.repeat(np.arange(len(chunks)), counts)  # (N,)
    firsts = counts.cumsum() - counts  # the row at which each chunk begins
    positions = np.arange(len(tokens)) + (starts - firsts)[sequence_of]
    blocks = tables[sequence_of, positions // block_size].astype(np.int64)
    metadata = AttentionMetadata(
        positions=to_device(positions, device),
        slots=to_device(blocks * block_size + positions % block_size, device),
        block_tables=to_device(tables, device),
        sequence_of=to_device(sequence_of.astype(np.int32), device),
        query_counts=counts.tolist(),
        max_keys=max_keys,
    )
    return to_device(np.array(tokens, np.int64), device), metadata


def _block_tables(chunks: list[Chunk], width: int) -> np.ndarray:
    """(S, width) int32, 0 where a sequence's table ends."""
    tables = np.zeros((len(chunks), width), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        blocks = chunk.seq.block_table[:width]  # it may have more, which this step doesn't reach
        row[: len(blocks)] = blocks
    return tables
