"""Packed linear layers, and whole networks on the CPU kernels: bit for bit in any batch."""

import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.engine.attention import AttentionMetadata, PagedAttend, Span, allocate_kv_cache
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import (
    EXACT_ROWS,
    PackedLinear,
    can_pack,
    pack_model,
    padded_rows,
    rows_are_independent,
)
from nanogpt.model.gpt import GPT, CausalAttend, GPTConfig

needs_packing = pytest.mark.skipif(
    not can_pack(torch.float32), reason="this CPU has no packed products"
)
needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
BLOCK = 16
SHAPES = [(384, 1152), (384, 384), (1536, 384), (128, 512), (512, 128), (128, 65), (768, 2304)]
# GPT-2's own, from small to xl, and the vocabulary with and without padding.
GPT2_SHAPES = [
    *((c * k, c * n) for c in (768, 1024, 1280, 1600) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))),
    (768, 50304),
    (768, 50257),
]


def small_gpt(
    dtype: torch.dtype = torch.float32, activation: str = "gelu", bias: bool = True
) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=128,
        vocab_size=65,
        n_layer=3,
        n_head=4,
        n_embd=128,
        bias=bias,
        activation=activation,  # type: ignore[arg-type]
    )
    model = GPT(config)
    model.init_weights()
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    return model.to(dtype).eval()


def test_padded_rows() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 64)] == [2, 2, 3, 64]
    assert [padded_rows(n) for n in (65, 72, 73, 600)] == [72, 72, 80, 600]


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("shape", [(1,), (5,), (EXACT_ROWS + 3,), (2, 3), (1, 1)])
@torch.inference_mode()
def test_agrees_with_linear_and_gelu(shape: tuple[int, ...], gelu: str | None, bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(96, 65, bias=bias)
    x = torch.randn(*shape, 96)
    expected = linear(x) if gelu is None else F.gelu(linear(x), approximate=gelu)
    ours = PackedLinear(linear, gelu)(x)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@needs_packing
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.large) for shape in GPT2_SHAPES)],
)
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others(inputs: int, outputs: int) -> None:
    torch.manual_seed(2)
    linear = PackedLinear(nn.Linear(inputs, outputs), "tanh")
    x = torch.randn(300, inputs)
    before = torch.get_num_threads()
    expected = linear(x)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for rows in (*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 255, 300):
                first = (7 * rows) % (301 - rows)
                ours = linear(x[first : first + rows])
                assert torch.equal(ours, expected[first : first + rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


def test_dependence_on_the_batch_is_noticed() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    assert not rows_are_independent(Centred(32, 32), 32, torch.float32)


@needs_packing
def test_packing_drops_the_unpacked_weights() -> None:
    model = small_gpt()
    weights = [weakref.ref(m.weight) for m in model.h.modules() if isinstance(m, nn.Linear)]
    embedding = model.wte.weight.clone()
    pack_model(model)
    assert len(weights) == 4 * len(model.h)
    assert not any(ref() is not None for ref in weights)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert torch.equal(model.wte.weight, embedding)


@needs_packing
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_model_is_the_model(activation: str, bias: bool) -> None:
    model = small_gpt(activation=activation, bias=bias)
    ids = torch.randint(65, (2, 50))
    expected = model(ids, CausalAttend())
    pack_model(model)
    torch.testing.assert_close(model(ids, CausalAttend()), expected, rtol=1e-4, atol=1e-4)


def test_without_packed_products_the_model_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nanogpt.engine.cpu.linear.can_pack", lambda dtype: False)
    model = small_gpt()
    pack_model(model)
    assert isinstance(model.lm_head, nn.Linear)
    assert "no packed products for torch.float32" in caplog.text


def hidden_in_chunks(model: GPT, texts: list[Tensor], rng: random.Random) -> list[Tensor]:
    """Final hidden states of each text, in chunks of random sizes that run in random company."""
    cache = allocate_kv_cache(model.config, 64, BLOCK, model.wte.weight.dtype)
    blocks = rng.sample(range(64), 64)
    tables = [[blocks.pop() for _ in range(-(-len(text) // BLOCK))] for text in texts]
    done, parts = [0] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    while waiting := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        chosen = rng.sample(waiting, rng.randint(1, len(waiting)))
        sizes = [
            min(rng.choice([1, 1, rng.randint(1, 90)]), len(texts[i]) - done[i]) for i in chosen
        ]
        runs = list(zip(chosen, sizes, strict=True))
        spans = [Span(done[i], done[i] + size, tables[i]) for i, size in runs]
        metadata = AttentionMetadata.build(spans, BLOCK)
        ids = torch.cat([texts[i][done[i] : done[i] + size] for i, size in runs])
        hidden = model.hidden(ids, metadata.positions, PagedAttend(cache, metadata))
        for (i, size), part in zip(runs, hidden.split(sizes), strict=True):
            parts[i].append(part)
            done[i] += size
    return [torch.cat(part) for part in parts]


@needs_packing
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5), seed=st.integers(0, 99))
@torch.inference_mode()
def test_a_network_is_the_same_to_the_bit_in_any_chunks(
    dtype: torch.dtype, lengths: list[int], seed: int
) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU has no packed products for {dtype}")
    rng = random.Random(seed)
    model = small_gpt(dtype)
    texts = [torch.randint(65, (length,)) for length in lengths]
    reference = [model.hidden(t, torch.arange(len(t)), CausalAttend()) for t in texts]
    pack_model(model)
    first = hidden_in_chunks(model, texts, rng)
    second = hidden_in_chunks(model, texts, rng)
    alone = [hidden_in_chunks(model, [text], rng)[0] for text in texts]
    logits = [model.lm_head(rows) for rows in first]
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for i in range(len(texts)):
        torch.testing.assert_close(first[i], reference[i], rtol=tolerance, atol=tolerance)
        assert torch.equal(first[i], second[i])
        assert torch.equal(first[i], alone[i])
        for row in range(len(texts[i])):
            assert torch.equal(model.lm_head(first[i][row : row + 1])[0], logits[i][row])
