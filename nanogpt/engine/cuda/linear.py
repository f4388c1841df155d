"""Linear layers on a GPU: logits in float32, and products that don't depend on the batch.

cuBLAS chooses a kernel by the number of rows, and kernels sum in different orders. Within one
kernel a row's answer depends neither on its place nor on other rows. So a product that is always
computed with TILE rows gives a token the same bits in whatever batch it is, at the price of more
launches for large batches and idle rows for small ones.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.model.gpt import GPT

log = logging.getLogger(__name__)

TILE = 64  # rows


class TiledLinear(nn.Module):
    """y = x W^T + b of an nn.Linear, always in products of TILE rows. Inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        outputs = [F.linear(tile, self.weight, self.bias) for tile in tiles_of(x.flatten(0, -2))]
        return torch.cat(outputs)[: x.numel() // x.size(-1)].unflatten(0, x.shape[:-1])


class Head(nn.Module):
    """Logits (N, vocabulary) in float32, accumulated as such: half precision has too few digits
    to tell likely tokens apart."""

    def __init__(self, weight: Tensor, *, tiled: bool = False) -> None:
        super().__init__()
        self.weight, self._tiled = weight, tiled

    def forward(self, x: Tensor) -> Tensor:
        if not self._tiled:
            return self._product(x)
        return torch.cat([self._product(tile) for tile in tiles_of(x)])[: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return F.linear(x, self.weight).float()


def tiles_of(x: Tensor) -> tuple[Tensor, ...]:
    """Rows (N, C) in tensors of TILE rows each; zeros fill the last one up."""
    return F.pad(x, (0, 0, 0, -len(x) % TILE)).split(TILE)


def make_deterministic(model: GPT) -> None:
    """Give each linear layer but the head products of a fixed number of rows, in place; the log
    names the layers for which that is not enough on this GPU."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for module in list(model.h.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                module.register_module(name, TiledLinear(child))
    for module in model.h[0].modules():
        if isinstance(module, TiledLinear) and not rows_are_independent(module):
            log.warning("products of %s depend on the batch on this GPU", module)


@torch.inference_mode()
def rows_are_independent(linear: TiledLinear) -> bool:
    """Try whether rows keep their bits in other places, among other rows."""
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * TILE, weight.size(1), generator=generator).to(weight.device, weight.dtype)
    y = linear(x)
    return all(
        torch.equal(linear(x.roll(shift, 0)[:rows]), y.roll(shift, 0)[:rows])
        for shift, rows in ((0, 1), (1, 2), (17, TILE), (TILE + 5, 2 * TILE))
    )
