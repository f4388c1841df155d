"""Linear layers and norms on our kernels: agreeing with torch, and bit for bit in any batch."""

import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.engine.cpu import linear as linear_module
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import GELU, PackedLinear, PackedNorm, bit_sums, pack_model
from nanogpt.engine.cpu.onednn import OneDNNLinear, has_products
from nanogpt.model import fingerprint
from nanogpt.model.gpt import CausalAttend
from tests.engine_utils import threads
from tests.small_gpt import small_gpt

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
needs_onednn = pytest.mark.skipif(
    not has_products(torch.float32), reason="this CPU has no packed products"
)
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of our own models, one with neither side a multiple of anything, and GPT-2's from small to xl.
SHAPES = [(384, 1152), (1536, 384), (97, 65), (768, 2304)]
GPT2_SHAPES = [
    *((c * k, c * n) for c in (768, 1024, 1280, 1600) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))),
    (768, 50304),
    (768, 50257),
]


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
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 32), (97, 65), (96, 384), (132, 70)])
def test_a_transposed_weight_is_packed_as_any(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """As it lies in Hugging Face's files; and the sums of its bits are those of torch."""
    weight = torch.randn(outputs, inputs, dtype=dtype)
    transposed = weight.t().contiguous().t()
    ops = torch.ops.nanogpt_cpu
    assert torch.equal(ops.pack_weight(transposed), ops.pack_weight(weight))
    assert torch.equal(ops.pack_weight_int8(transposed), ops.pack_weight_int8(weight))
    expected = fingerprint.bit_sums(weight)
    for either in (weight, transposed):
        assert all(map(torch.equal, bit_sums(either), expected))


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
@pytest.mark.parametrize("dtype", [*TYPES, torch.int8])
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.large) for shape in GPT2_SHAPES)],
)
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    int8 = dtype == torch.int8
    layer = random_linear(inputs, outputs, torch.float32 if int8 else dtype)
    linear = PackedLinear(layer, "tanh", int8=int8)
    x = torch.randn(300, inputs)
    expected = linear(x)
    for count in (1, 2):
        with threads(count):
            for rows in (*range(1, 71), 100, 255, 300):
                first = (7 * rows) % (301 - rows)
                ours = linear(x[first : first + rows])
                assert torch.equal(ours, expected[first : first + rows]), (count, rows)


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 15, 16, 50, 384, 768])
@torch.inference_mode()
def test_norms(size: int, bias: bool) -> None:
    norm = nn.LayerNorm(size, bias=bias)
    for param in norm.parameters():
        param += torch.randn_like(param)
    x = 3 * torch.randn(90, size) + 1
    expected = norm.double()(x.double())
    packed = PackedNorm(norm.float())
    ours = packed(x)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    for count in (1, 2):
        with threads(count):
            for rows in (1, 2, 7, 64):
                assert torch.equal(packed(x[5 : 5 + rows]), ours[5 : 5 + rows])


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
        ({"x": torch.zeros(3, 95)}, "is not of 95 inputs"),
        ({"x": torch.zeros(3, 96).half()}, "x must be"),
        ({"outputs": 97}, "97 outputs"),
        ({"bias": torch.zeros(64)}, "a bias must be"),
        ({"bias": torch.zeros(65).half()}, "expected scalar type Float"),
        ({"residual": torch.zeros(3, 64)}, "a residual must be"),
        ({"packed": torch.zeros(3, 96, 32, 2)}, "is not of 96 inputs"),
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


def int8_reference(linear: nn.Linear, x: Tensor) -> Tensor:
    """The product in whole numbers, from the definition, then float32."""

    def quantized(a: Tensor) -> tuple[Tensor, Tensor]:
        top = a.abs().amax(1, keepdim=True)
        inverse = torch.where(top > 0, torch.full_like(top, 127) / top, torch.zeros_like(top))
        return (a * inverse).round().double(), top / 127

    (q, scale), (w, w_scale) = quantized(x), quantized(linear.weight.float())
    y = (q @ w.T).float() * (w_scale.T * scale)  # sums below 2**53 are exact
    return y if linear.bias is None else y + linear.bias.float()


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 33), (97, 65), (768, 96), (3072, 64)])
@torch.inference_mode()
def test_int8_is_exact_to_the_bit(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    linear = random_linear(inputs, outputs, dtype)
    x = torch.randn(40, inputs) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    x[5] = x[5].abs().amax() * torch.randn(inputs).sign()  # the largest sums that there can be
    linear.weight[0] = linear.weight[0].sign()
    assert torch.equal(PackedLinear(linear, int8=True)(x), int8_reference(linear, x))


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
