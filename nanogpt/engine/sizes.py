"""What models take in memory, and how a given memory is shared by all that are served."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanogpt.config import ServeConfig
from nanogpt.engine.attention import kv_bytes_per_block
from nanogpt.engine.kv_cache import blocks_per_context
from nanogpt.model.dtypes import DTYPES
from nanogpt.model.gpt import GPTConfig
from nanogpt.registry import ModelInfo

LEAST_CONTEXTS = 4  # full ones of each model; with fewer it is better to have fewer models


class Size(NamedTuple):
    """Of one model on one rank."""

    weights: int  # bytes
    context: int  # bytes of KV of a full one
    blocks_per_context: int


class Share(NamedTuple):
    """Of one model in the memory of all; with 0 blocks it does not fit."""

    bytes: int  # weights and KV
    blocks: int


def size_of(config: ServeConfig, device: torch.device, info: ModelInfo, shape: GPTConfig) -> Size:
    """Bytes that a model takes on this device once it is ready to run."""
    block_size = config.engine.block_size
    # With int8 products, what is not multiplied keeps 16 bits.
    dtype = DTYPES.get(info.dtype, torch.bfloat16)
    blocks = blocks_per_context(info.context_length, block_size)
    return Size(
        _weight_bytes(shape, dtype, device, int8=info.dtype == "int8"),
        blocks * kv_bytes_per_block(shape, block_size, dtype, device),
        blocks,
    )


def _weight_bytes(shape: GPTConfig, dtype: torch.dtype, device: torch.device, *, int8: bool) -> int:
    width, product = shape.n_embd, 1 if int8 else dtype.itemsize
    embeddings = (shape.vocab_size + shape.block_size) * width * dtype.itemsize
    vectors = (shape.n_layer * (13 if shape.bias else 2) + 2) * width * 4
    products = shape.n_layer * 12 * width * width
    if device.type == "cpu":
        products += shape.vocab_size * width  # the head is packed: no longer the embedding's
    return embeddings + vectors + products * product


def share(memory: int, kv: int, sizes: Sequence[Size], *, most_contexts: int) -> list[Share]:
    """Each model's share of `memory` bytes, of which KV gets `kv` at the most when all are there.

    All get the same number of full contexts, of which there are as many as leave all models in
    memory together, but LEAST_CONTEXTS at least; then not all models can be there at once. Of a
    model that leaves less beside its own weights, all that is left.
    """
    together = min(kv, memory - sum(size.weights for size in sizes))
    even = together / sum(size.context for size in sizes)
    contexts = max(min(even, most_contexts), min(LEAST_CONTEXTS, most_contexts))
    shares = []
    for size in sizes:
        own = min(contexts, (memory - size.weights) / size.context)
        blocks = int(own * size.blocks_per_context) if own >= 1 else 0
        kv_bytes = blocks * size.context // size.blocks_per_context
        shares.append(Share(size.weights + kv_bytes, blocks))
    return shares
