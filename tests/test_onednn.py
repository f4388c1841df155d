"""oneDNN's packed linear layers: agreeing with torch, and bit for bit in any batch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.engine.cpu.onednn import (
    EXACT_ROWS,
    OneDNNLinear,
    has_products,
    padded_rows,
    rows_are_independent,
)
from tests.engine_utils import threads

needs_onednn = pytest.mark.skipif(
    not has_products(torch.float32), reason="this CPU has no packed products"
)
SHAPES = [(384, 1152), (1536, 384), (128, 65)]
# GPT-2's own, from small to xl, and the vocabulary with and without padding.
GPT2_SHAPES = [
    *((c * k, c * n) for c in (768, 1024, 1280, 1600) for k, n in ((1, 3), (1, 1), (1, 4), (4, 1))),
    (768, 50304),
    (768, 50257),
]


def test_padded_rows() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 64)] == [2, 2, 3, 64]
    assert [padded_rows(n) for n in (65, 72, 73, 600)] == [72, 72, 80, 600]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("shape", [(1,), (5,), (EXACT_ROWS + 3,), (2, 3), (1, 1)])
@torch.inference_mode()
def test_agrees_with_linear_and_gelu(shape: tuple[int, ...], gelu: str | None, bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(96, 65, bias=bias)
    x = torch.randn(*shape, 96)
    expected = linear(x) if gelu is None else F.gelu(linear(x), approximate=gelu)
    ours = OneDNNLinear(linear, gelu)(x)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.large) for shape in GPT2_SHAPES)],
)
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others(inputs: int, outputs: int) -> None:
    torch.manual_seed(2)
    linear = OneDNNLinear(nn.Linear(inputs, outputs), "tanh")
    x = torch.randn(300, inputs)
    expected = linear(x)
    for count in (1, 2):
        with threads(count):
            for rows in (1, 2, 3, 8, 9, 16, 31, 63, 65, 100, 300):
                first = (7 * rows) % (301 - rows)
                ours = linear(x[first : first + rows])
                assert torch.equal(ours, expected[first : first + rows]), (count, rows)


def test_dependence_on_the_batch_is_noticed() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    assert not rows_are_independent(Centred(32, 32), 32, torch.float32)
