"""Linear layers on our kernels, and whole networks on them: bit for bit in any batch."""

import math
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.engine.attention import AttentionMetadata, PagedAttend, Span, allocate_kv_cache
from nanogpt.engine.cpu import linear as linear_module
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import GELU, PackedLinear, pack_model
from nanogpt.engine.cpu.onednn import OneDNNLinear, has_products
from nanogpt.model.gpt import GPT, CausalAttend, GPTConfig

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
needs_onednn = pytest.mark.skipif(
    not has_products(torch.float32), reason="this CPU has no packed products"
)
BLOCK = 16
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of final hidden states: keys and values are rounded to the type of the weights.
KV_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
# Of our own models, one with neither side a multiple of anything, and GPT-2's from small to xl.
SHAPES = [(384, 1152), (1536, 384), (97, 65), (768, 2304)]
GPT2_SHAPES = [
    *((c * k, c * n) for c in (768, 1024, 1280, 1600) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))),
    (768, 50304),
    (768, 50257),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def random_linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("shape", [(1,), (5,), (67,), (2, 3), (1, 1), (0,)])
@torch.inference_mode()
def test_agrees_with_linear_and_gelu(
    shape: tuple[int, ...], gelu: str | None, bias: bool, dtype: torch.dtype
) -> None:
    linear = random_linear(96, 65, dtype, bias)
    x = torch.randn(*shape, 96)
    exact = linear.double()(x.double())
    expected = exact if gelu is None else F.gelu(exact, approximate=gelu)
    ours = PackedLinear(linear.to(dtype), gelu)(x)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 33), (3072, 31), (97, 65)])
@torch.inference_mode()
def test_sizes_that_fill_no_panel(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    linear = random_linear(inputs, outputs, dtype)
    # Neighbours of what a row may read, and strides: columns of a larger tensor.
    x = torch.full((40, inputs + 5), math.nan)
    x[:, 2:-3] = torch.randn(40, inputs)
    expected = linear.double()(x[:, 2:-3].double())
    ours = PackedLinear(linear.to(dtype))(x[:, 2:-3])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_right_to_the_last_bits(approximate: str) -> None:
    x = torch.cat([torch.linspace(-15, 15, 2**16), torch.logspace(-30, 30, 2**12)])
    expected = F.gelu(x.double(), approximate=approximate)
    ours = torch.ops.nanogpt_cpu.gelu(x, GELU[approximate])
    # Relative to the value, or where x is below -1 and little is left, absolute.
    torch.testing.assert_close(ours.double(), expected, rtol=4e-7, atol=4e-7)
    odd = torch.tensor([math.nan, math.inf, 0.0, -1e30] * 4)
    ours = torch.ops.nanogpt_cpu.gelu(odd, GELU[approximate])[:4]
    torch.testing.assert_close(ours, torch.tensor([math.nan, math.inf, 0, 0]), equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.large) for shape in GPT2_SHAPES)],
)
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others(
    inputs: int, outputs: int, dtype: torch.dtype, threads: None
) -> None:
    linear = PackedLinear(random_linear(inputs, outputs, dtype), "tanh")
    x = torch.randn(300, inputs)
    expected = linear(x)
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (*range(1, 71), 100, 255, 300):
            first = (7 * rows) % (301 - rows)
            ours = linear(x[first : first + rows])
            assert torch.equal(ours, expected[first : first + rows]), (count, rows)


@needs_kernels
@torch.inference_mode()
def test_the_residual_is_added_and_may_be_the_result() -> None:
    linear = random_linear(96, 65, torch.float32)
    x, residual = torch.randn(30, 96), torch.randn(30, 65)
    packed = torch.ops.nanogpt_cpu.pack_weight(linear.weight)
    ours = torch.ops.nanogpt_cpu.linear(x, packed, linear.bias, 65, GELU["none"], residual)
    torch.testing.assert_close(ours, residual + F.gelu(linear(x)), rtol=1e-5, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 95)}, "x must be"),
        ({"x": torch.zeros(3, 96).half()}, "x must be"),
        ({"outputs": 97}, "don't fill"),
        ({"bias": torch.zeros(64)}, "bias and residual"),
        ({"residual": torch.zeros(3, 64)}, "bias and residual"),
        ({"packed": torch.zeros(3, 96, 32, 2)}, "x must be"),
        ({"packed": torch.zeros(3, 48, 32, 2)}, "in groups of 2"),
        ({"packed": torch.zeros(3, 96, 32, 1).long()}, "no products for"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str) -> None:
    good = {
        "x": torch.zeros(3, 96),
        "packed": torch.zeros(3, 96, 32, 1),
        "bias": torch.zeros(65),
        "outputs": 65,
        "gelu": 0,
        "residual": None,
    }
    torch.ops.nanogpt_cpu.linear(**good)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.nanogpt_cpu.linear(**(good | change))


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
def test_packing_drops_the_unpacked_weights(dtype: torch.dtype) -> None:
    model = small_gpt(dtype)
    weights = [weakref.ref(m.weight) for m in model.h.modules() if isinstance(m, nn.Linear)]
    embedding = model.wte.weight.clone()
    pack_model(model)
    assert len(weights) == 4 * len(model.h)
    assert not any(ref() is not None for ref in weights)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert torch.equal(model.wte.weight, embedding)
    assert model.wte.weight.dtype == dtype


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_model_is_the_model(activation: str, bias: bool, dtype: torch.dtype) -> None:
    """In float32 arithmetic, whatever type the weights are kept in."""
    model = small_gpt(dtype, activation, bias)
    ids = torch.randint(65, (2, 50))
    expected = model.float()(ids, CausalAttend())
    model.to(dtype)
    pack_model(model)
    torch.testing.assert_close(model(ids, CausalAttend()), expected, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("dtype", TYPES)
@torch.inference_mode()
def test_without_our_kernels_onednn_multiplies(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "load_kernels", lambda: False)
    monkeypatch.setattr(linear_module, "multiplies_natively", lambda dtype: False)
    model = small_gpt(dtype)
    ids = torch.randint(65, (2, 50))
    expected = model.float()(ids, CausalAttend())
    model.to(dtype)
    pack_model(model)
    assert isinstance(model.lm_head, OneDNNLinear)
    torch.testing.assert_close(model(ids, CausalAttend()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", TYPES)
def test_weights_are_kept_in_what_is_fastest(
    stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best(kernels: bool, native: bool) -> torch.dtype:
        monkeypatch.setattr(linear_module, "load_kernels", lambda: kernels)
        monkeypatch.setattr(linear_module, "multiplies_natively", lambda dtype: native)
        return linear_module.best_dtype(stored)

    ours = torch.float16 if stored == torch.float16 else torch.bfloat16
    assert best(kernels=True, native=False) == ours
    assert best(kernels=False, native=False) == torch.float32
    assert best(kernels=True, native=True) == best(kernels=False, native=True) == torch.bfloat16


@torch.inference_mode()
def test_without_packed_products_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear_module, "load_kernels", lambda: False)
    monkeypatch.setattr("nanogpt.engine.cpu.onednn.has_products", lambda dtype: False)
    model = small_gpt(torch.bfloat16)
    pack_model(model)
    assert isinstance(model.lm_head, nn.Linear)
    assert model(torch.zeros(1, 1, dtype=torch.long), CausalAttend()).dtype == torch.float32
    assert "no packed products" in caplog.text


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


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5), seed=st.integers(0, 99))
@torch.inference_mode()
def test_a_network_is_the_same_to_the_bit_in_any_chunks(
    dtype: torch.dtype, lengths: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    model = small_gpt(dtype)
    texts = [torch.randint(65, (length,)) for length in lengths]
    model.float()
    reference = [model.hidden(t, torch.arange(len(t)), CausalAttend()) for t in texts]
    model.to(dtype)
    pack_model(model)
    first = hidden_in_chunks(model, texts, rng)
    second = hidden_in_chunks(model, texts, rng)
    alone = [hidden_in_chunks(model, [text], rng)[0] for text in texts]
    logits = [model.lm_head(rows) for rows in first]
    tolerance = KV_TOLERANCE[dtype]
    for i in range(len(texts)):
        torch.testing.assert_close(first[i], reference[i], rtol=tolerance, atol=tolerance)
        assert torch.equal(first[i], second[i])
        assert torch.equal(first[i], alone[i])
        for row in range(len(texts[i])):
            assert torch.equal(model.lm_head(first[i][row : row + 1])[0], logits[i][row])
