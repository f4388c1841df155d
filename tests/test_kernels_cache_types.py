"""Float32 rows over a KV cache of a smaller type: a model with 16-bit weights on a CPU."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanogpt.engine.attention import (
    AttentionBackend,
    AttentionMetadata,
    PagedAttend,
    Span,
    allocate_kv_cache,
)
from nanogpt.engine.cpu.backend import CPUBackend
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.plain import TiledBackend
from nanogpt.model.gpt import GPTConfig

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
BLOCK, HEADS, SIZE = 16, 2, 40


def attended(
    backend: AttentionBackend, qkv: Tensor, table: list[int], cuts: list[int], kept: torch.dtype
) -> Tensor:
    """Answers (T, nh, hs) of one sequence (T, 3, nh, hs) in chunks that end at `cuts`."""
    config = GPTConfig(n_layer=1, n_head=HEADS, n_embd=HEADS * SIZE)
    cache = allocate_kv_cache(config, max(table) + 1, BLOCK, kept, backend=backend)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(qkv)], strict=True):
        metadata = AttentionMetadata.build([Span(start, end, table)], BLOCK)
        parts.append(PagedAttend(cache, metadata)(0, *qkv[start:end].unbind(1)))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "backend",
    [TiledBackend(), pytest.param(CPUBackend(), marks=needs_kernels)],
    ids=lambda b: b.name,
)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 70), seed=st.integers(0, 999))
def test_keys_and_values_are_rounded_and_nothing_else(
    backend: AttentionBackend, kept: torch.dtype, length: int, seed: int
) -> None:
    rng = random.Random(seed)
    qkv = torch.randn(length, 3, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    table = rng.sample(range(9), -(-length // BLOCK))
    cuts = sorted(rng.sample(range(1, length), rng.randint(0, min(3, length - 1))))
    rounded = qkv.clone()
    rounded[:, 1:] = qkv[:, 1:].to(kept)
    ours = attended(backend, qkv, table, cuts, kept)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, attended(backend, rounded, table, cuts, torch.float32))
