"""Dropout that a CPU can afford.

PyTorch's dropout on a CPU draws one Bernoulli number for each element in one thread, and takes a
fifth of the time of a small model's training step. Here 64 random bits decide eight elements.
"""

from typing import Any

import torch
from torch import Tensor, nn

_LEVELS = 256  # a byte decides, so probabilities are multiples of 1/256


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped_levels: int) -> Tensor:
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = (bits.view(torch.uint8)[: x.numel()] >= dropped_levels).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = _LEVELS / (_LEVELS - dropped_levels)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None


class ByteDropout(nn.Module):
    """Inverted dropout on CPU tensors, with p rounded to the nearest multiple of 1/256."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropped_levels = min(round(p * _LEVELS), _LEVELS - 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped_levels:
            return x
        return _Drop.apply(x, self.dropped_levels)


def replace_dropout(module: nn.Module) -> None:
    """Put a ByteDropout in the place of every nn.Dropout below `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, ByteDropout(child.p))
        else:
            replace_dropout(child)
