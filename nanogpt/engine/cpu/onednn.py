"""Linear layers on oneDNN's packed products: for CPUs without our kernels, or with bfloat16 units.

oneDNN lays a packed weight out in the blocks that its kernels read, so a product runs at the speed
of memory; `F.linear` would lay it out anew in every call. The packed products are also the same to
the bit for each row, whatever other rows there are, from two rows up and for any number of threads.
One row alone goes through another kernel with other bits, so there are always at least two.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

# Each new number of rows costs oneDNN about 2 ms of compiling, once, and a place among the 1024
# kernels that it keeps. Decode batches come in few sizes; prefill, with larger ones, is rounded.
EXACT_ROWS, ROW_STEP = 64, 8


def padded_rows(rows: int) -> int:
    """How many rows a product is computed with, so that `rows` of them are wanted."""
    return max(2, rows) if rows <= EXACT_ROWS else -(-rows // ROW_STEP) * ROW_STEP


class OneDNNLinear(nn.Module):
    """y = x W^T + b of an nn.Linear, then GELU if asked: (..., in) to (..., out), of one type.

    That is the type of `linear`, or float32 where the CPU does not multiply that type. `gelu` is
    the `approximate` of nn.GELU ("none" or "tanh"); None means no activation. Inference only.
    """

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype if has_products(linear.weight.dtype) else torch.float32
        # The number of rows is left open (None); the layout must fit all of them.
        weight = linear.weight.detach().to(self.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)
        self._post: tuple[str, list[float], str]
        self._post = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._post[0]}"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        extra = padded_rows(rows) - rows
        if not extra:
            return self._product(x)
        flat = F.pad(x.reshape(rows, self.in_features), (0, 0, 0, extra))
        return self._product(flat)[:rows].view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._post)


def has_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed products of this type in hardware on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32


def rows_are_independent(linear: nn.Module, inputs: int, dtype: torch.dtype) -> bool:
    """Try whether a row's product is the same to the bit among 1, 2, 3, 7, 16, 33 and 72 rows."""
    x = torch.randn(72, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = linear(x)
    return all(
        torch.equal(linear(x[-rows:]), y[-rows:]) and torch.equal(linear(x[:rows]), y[:rows])
        for rows in (1, 2, 3, 7, 16, 33)
    )


def warn_of_dependence(block: nn.Module) -> None:
    """A CPU that nobody has measured may have other kernels: try each layer of a block."""
    for module in block.modules():
        if isinstance(module, OneDNNLinear) and not rows_are_independent(
            module, module.in_features, module.dtype
        ):
            log.warning("products of %s depend on the batch on this CPU", module)
