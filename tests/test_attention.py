"""Paged attention: every backend against a plain reference, and the C++ kernel bit for bit."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.engine.attention import (
    AttentionBackend,
    AttentionMetadata,
    PagedAttend,
    Span,
    TorchBackend,
    allocate_kv_cache,
    kv_bytes_per_block,
    select_backend,
)
from nanogpt.engine.cpu.backend import CPUBackend
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.plain import TiledBackend
from nanogpt.model.gpt import GPTConfig
from tests.attention_cases import (
    BLOCK,
    Step,
    Text,
    assert_is_attention,
    assert_same,
    attend_all,
    chunked,
    paged,
)
from tests.engine_utils import threads

CPU = torch.device("cpu")
NAN = float("nan")  # in slots that nobody has written

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
EXACT = [TiledBackend(), pytest.param(CPUBackend(), marks=needs_kernels)]
BACKENDS = [TorchBackend(), *EXACT]
few = settings(max_examples=15, deadline=None)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@few
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    n_head=st.integers(1, 3),
    head_size=st.sampled_from([8, 16, 24, 32, 40, 64, 80, 96, 128]),
    seed=st.integers(0, 999),
)
def test_agrees_with_the_definition(
    backend: AttentionBackend,
    dtype: torch.dtype,
    lengths: list[int],
    n_head: int,
    head_size: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    texts = [Text.random(n, n_head, head_size, dtype, seed + i) for i, n in enumerate(lengths)]
    steps = chunked(lengths, rng, 40)
    assert_is_attention(attend_all(backend, texts, paged(lengths, rng), steps, fill=NAN), texts)


@pytest.mark.parametrize("backend", EXACT, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@few
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    head_size=st.sampled_from([32, 40, 64, 128]),
    seed=st.integers(0, 999),
)
def test_a_row_is_the_same_to_the_bit_in_any_batch_chunk_and_placement(
    backend: AttentionBackend, dtype: torch.dtype, lengths: list[int], head_size: int, seed: int
) -> None:
    rng = random.Random(seed)
    texts = [Text.random(n, 2, head_size, dtype, seed + i) for i, n in enumerate(lengths)]
    alone: list[Step] = [[(i, p, p + 1)] for i, n in enumerate(lengths) for p in range(n)]
    with threads(1):
        expected = attend_all(backend, texts, paged(lengths, rng), alone)
    for count in (1, 2, 4):
        steps = chunked(lengths, rng, rng.choice([3, 20, 70]))
        with threads(count):
            assert_same(attend_all(backend, texts, paged(lengths, rng), steps), expected)


@needs_kernels
@few
@given(
    prompt=st.integers(1, 5),  # blocks
    shared=st.lists(st.integers(0, 5), min_size=2, max_size=20),  # how many of them each keeps
    own=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_kernel_reads_a_shared_prefix_once_without_changing_a_bit(
    prompt: int, shared: list[int], own: int, seed: int
) -> None:
    rng = random.Random(seed)
    first = Text.random(prompt * BLOCK, 2, 32, torch.float32, seed)
    prefix = [min(n, prompt) * BLOCK for n in shared]
    texts = [first] + [
        Text.random(p + own, 2, 32, torch.float32, seed + 1 + i).sharing(first, p)
        for i, p in enumerate(prefix)
    ]
    separate = paged([len(text) for text in texts], rng)
    forked = [separate[0]] + [
        separate[0][: p // BLOCK] + table[p // BLOCK :]
        for p, table in zip(prefix, separate[1:], strict=True)
    ]
    prefill: Step = [(0, 0, len(first))]
    decode: list[Step] = [
        [(i + 1, p + t, p + t + 1) for i, p in enumerate(prefix)] for t in range(own)
    ]
    for count in (1, 2, 4):
        with threads(count):
            ours = attend_all(CPUBackend(), texts, forked, [prefill, *decode])
        for i, p in enumerate(prefix, start=1):
            alone = attend_all(CPUBackend(), texts, separate, [[(i, 0, p + own)]])[i]
            for position in range(p, p + own):
                assert torch.equal(ours[i][position], alone[position])


@needs_kernels
def test_long_contexts() -> None:
    texts = [Text.random(1024, 2, 64, torch.float32, 5)]
    tables = paged([1024], random.Random(5))
    whole = attend_all(CPUBackend(), texts, tables, [[(0, 0, 1024)]])
    parts = attend_all(CPUBackend(), texts, tables, [[(0, 0, 1000)], [(0, 1000, 1024)]])
    assert_same(whole, parts)
    ours = torch.stack([whole[0][p] for p in range(1024)]).double()
    torch.testing.assert_close(ours, texts[0].reference(), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    text = Text.random(40, 1, 32, torch.float32, 1)
    text.q *= 300  # scores of a few thousand: one key takes all the weight
    answer = attend_all(CPUBackend(), [text], [[0, 1, 2]], [[(0, 0, 40)]])[0]
    ours = torch.stack([answer[p] for p in range(40)]).double()
    torch.testing.assert_close(ours, text.reference(), rtol=1e-3, atol=1e-3)


@needs_kernels
def test_exponential_is_within_one_unit_in_the_last_place() -> None:
    bits = torch.arange(0x80000000 - 2**32, -0x3D500000, 997, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)  # -0.0 down to about -87
    x = x[: len(x) // 16 * 16].contiguous()
    assert x.min() < -80
    assert x.max() == 0
    exact = x[x > -87.3].double().exp()
    ours = torch.ops.nanogpt_cpu.exp_nonpositive(x)[x > -87.3]
    unit = exact.float().abs() * 2**-23
    assert ((ours.double() - exact).abs() / unit).max() <= 1.0
    edge = torch.tensor([0.0, -87.4, -1e30, -torch.inf, torch.nan] + [0.0] * 11)
    assert torch.ops.nanogpt_cpu.exp_nonpositive(edge)[:4].tolist() == [1, 0, 0, 0]
    assert torch.ops.nanogpt_cpu.exp_nonpositive(edge)[4].isnan()


@needs_kernels
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slots", 10**6, "outside the cache"),
        ("slots", -1, "outside the cache"),
        ("positions", 10**6, "past its block table"),
        ("positions", -1, "past its block table"),
        ("sequence_of", 7, "belongs to no sequence"),
        ("block_tables", 99, "does not exist"),
    ],
)
def test_kernel_refuses_indices_outside_the_cache(field: str, value: int, message: str) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=32)
    cache = allocate_kv_cache(config, 3, BLOCK, torch.float32, backend=CPUBackend())
    metadata = AttentionMetadata.build([Span(0, 4, [2])], BLOCK)
    getattr(metadata, field).view(-1)[-1] = value
    qkv = torch.zeros(3, 4, 1, 32)
    with pytest.raises(RuntimeError, match=message):
        PagedAttend(cache, metadata)(0, *qkv)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_copied_block_is_the_block(backend: AttentionBackend) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64)
    cache = allocate_kv_cache(config, 4, BLOCK, torch.float32, backend=backend)
    text = Text.random(20, 2, 32, torch.float32, 3)
    for layer in range(2):
        metadata = AttentionMetadata.build([Span(0, 20, [0, 1])], BLOCK)
        PagedAttend(cache, metadata)(layer, text.q, text.k, text.v)
    cache.copy_block(1, 3)
    last = slice(19, 20)
    results = []
    for table in ([0, 1], [0, 3]):
        attend = PagedAttend(cache, AttentionMetadata.build([Span(19, 20, table)], BLOCK))
        results.append([attend(i, text.q[last], text.k[last], text.v[last]) for i in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_metadata_places_every_row() -> None:
    metadata = AttentionMetadata.build([Span(14, 18, [5, 2, 9]), Span(0, 1, [7])], BLOCK)
    assert metadata.positions.tolist() == [14, 15, 16, 17, 0]
    assert metadata.slots.tolist() == [94, 95, 32, 33, 112]
    assert metadata.sequence_of.tolist() == [0, 0, 0, 0, 1]
    assert metadata.block_tables.tolist() == [[5, 2], [7, 0]]
    assert (metadata.host_counts, metadata.host_max_keys) == ([4, 1], 18)
    bare = AttentionMetadata(
        metadata.positions, metadata.slots, metadata.block_tables, metadata.sequence_of
    )
    assert (bare.host_counts, bare.host_max_keys) == ([4, 1], 18)


def test_plain_torch_serves_what_the_kernel_cannot() -> None:
    assert select_backend(CPU, torch.float64, BLOCK).name == "torch-tiled"
    assert select_backend(CPU, torch.float32, 8).name == "torch-tiled"
    with pytest.raises(ValueError, match="multiple of 16"):
        allocate_kv_cache(GPTConfig(), 1, 8, torch.float32, backend=CPUBackend())


def test_bytes_of_a_block() -> None:
    config = GPTConfig(n_layer=3, n_head=2, n_embd=128)
    assert kv_bytes_per_block(config, BLOCK, torch.float32) == 2 * 3 * BLOCK * 128 * 4
    assert kv_bytes_per_block(config, BLOCK, torch.bfloat16) == 2 * 3 * BLOCK * 128 * 2
