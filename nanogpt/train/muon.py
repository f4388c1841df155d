"""Muon: momentum whose update is made orthogonal, for the matrices of the hidden layers.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): Newton-Schulz
iteration with its quintic coefficients. The scale that makes an update's RMS that of AdamW, and
the decoupled weight decay, are from Liu et al., "Muon is scalable for LLM training" (2025), 2.2.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_RMS = 0.2  # of an AdamW update, about


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of a batch (N, rows, columns), float32.

    Singular values come out between 0.7 and 1.2, which is all that the optimiser needs; those
    below a thousandth of the largest stay small.
    """
    rows, columns = x.shape[-2:]
    if rows > columns:
        return orthogonalize(x.mT).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if columns >= 2 * rows:
        return _polynomial(x @ x.mT) @ x
    for _ in range(_STEPS):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _polynomial(gram: Tensor) -> Tensor:
    """The factor by which the whole iteration multiplies x, from its Gram matrix (N, rows, rows).

    Every factor is a polynomial of the Gram matrix, so they commute and the long side of a wide
    matrix takes part only at the start and at the end: half of the work at 384 x 1536.
    """
    one = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    product = one
    for i in range(_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) + _A * one
        product = factor @ product if i else factor
        if i + 1 < _STEPS:
            gram = factor @ gram @ factor
    return product


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, in float32, for 2-D parameters.

    A group's parameters may be several matrices one above the other, as those of queries, keys and
    values are: `parts` says how many, and each is made orthogonal on its own.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        parts: int = 1,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; products of equal shape are done in one batch."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if "momentum" not in self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
                buffer = self.state[param]["momentum"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(buffer, group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                for target, piece in zip(
                    param.chunk(group["parts"]), update.chunk(group["parts"]), strict=True
                ):
                    tall = piece.size(0) > piece.size(1)
                    item = (target.mT, piece.mT) if tall else (target, piece)
                    by_shape[item[0].shape].append((*item, group["lr"]))
        for shape, items in by_shape.items():
            scale = _RMS * max(shape) ** 0.5
            ortho = orthogonalize(torch.stack([piece for _, piece, _ in items]).float())
            for (target, _, lr), direction in zip(items, ortho, strict=True):
                target.add_(direction.to(target.dtype), alpha=-lr * scale)
