"""A loaded network made fast on a CPU: weights packed once, arithmetic in float32.

Weights stay in the type they were loaded in, which is what a small batch waits for; our kernels
(product.h) widen them in registers, exactly. Everything between the products is float32. A row's
answer is the same to the bit whatever other rows there are.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.engine.cpu import onednn
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.network import FusedHidden
from nanogpt.model import fingerprint
from nanogpt.model.gpt import GPT

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

GELU = {None: 0, "none": 1, "tanh": 2}  # enum class Gelu of gelu.h


class PackedLinear(nn.Module):
    """y = x W^T + b of an nn.Linear, then GELU if asked: (..., in) to (..., out), float32.

    The weights keep the type of `linear`: float32, bfloat16 or float16; or they, and each row of x
    as it comes, are rounded to 8 bits with a scale of their own. `gelu` is the `approximate` of
    nn.GELU ("none" or "tanh"); None means no activation. Inference only.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, gelu: str | None = None, *, int8: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        ops = torch.ops.nanogpt_cpu
        pack = ops.pack_weight_int8 if int8 else ops.pack_weight
        self.weight = pack(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.gelu = GELU[gelu]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = torch.ops.nanogpt_cpu.linear(
            flat, self.weight, self.bias, self.out_features, self.gelu, None
        )
        return y.view(*x.shape[:-1], self.out_features)


class PackedNorm(nn.Module):
    """An nn.LayerNorm over the last dimension, in float32: (..., C) to (..., C)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = norm.weight.detach().float()
        self.bias = None if norm.bias is None else norm.bias.detach().float()
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1)).contiguous()
        return torch.ops.nanogpt_cpu.layer_norm(flat, self.weight, self.bias, self.eps).view_as(x)


class WideEmbedding(nn.Module):
    """Rows of a table that stays in its own type, as float32: (...) int64 to (..., C)."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight).float()


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes this 16-bit type for rows and weights alike, faster than float32."""
    return dtype != torch.float32 and onednn.has_products(dtype)


def bit_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As those of nanogpt/model/fingerprint.py; of a matrix at the speed of memory, also of one
    that is a transposed view. Needs our kernels."""
    if weight.dim() == 2 and weight.shape[1] * weight.itemsize % 8 == 0:
        return torch.ops.nanogpt_cpu.bit_sums(weight.detach())
    return fingerprint.bit_sums(weight)


def best_dtype(stored: torch.dtype) -> torch.dtype:
    """What to keep weights in that a file has as `stored`: what this CPU is fastest with.

    Where our kernels run, that is 16 bits, read in half the time; the file's own if it has 16.
    """
    if multiplies_natively(torch.bfloat16):
        return torch.bfloat16
    if not load_kernels():
        return torch.float32
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


@torch.inference_mode()
def pack_model(model: GPT, *, int8: bool = False) -> None:
    """Make a loaded model fast, in place: packed products, float32 in between; GELU joins c_fc.

    The unpacked weights are dropped one by one, so memory does not double; of a tied head the
    embedding keeps its own copy. Without our kernels the weights become float32, for oneDNN;
    without that too the model multiplies as torch does, and the log says so. `int8` asks for
    weights and rows of eight bits in every product, which needs our kernels.
    """
    native = multiplies_natively(model.wte.weight.dtype) and not int8
    if not native:
        _replace(model, nn.Embedding, lambda table, _: WideEmbedding(table))
    if not native and load_kernels():
        _replace(model, nn.LayerNorm, lambda norm, _: PackedNorm(norm))
        _replace(model, nn.Linear, lambda linear, gelu: PackedLinear(linear, gelu, int8=int8))
        _fuse(model)
    elif native or onednn.has_products(torch.float32):
        _replace(model, nn.LayerNorm, lambda norm, _: norm if native else norm.float())
        _replace(model, nn.Linear, onednn.OneDNNLinear)
        onednn.warn_of_dependence(model.h[0])
    else:
        model.float()
        log.warning("no packed products on this CPU: slower, and not bitwise stable")


def _fuse(model: GPT) -> None:
    """Let `model.hidden` run in one call."""
    # In the order in which they are applied, as the network defines them; the head comes last.
    parts = [m for m in model.modules() if isinstance(m, PackedLinear | PackedNorm)]
    assert parts.pop() is model.lm_head
    gelu = max(part.gelu for part in parts if isinstance(part, PackedLinear))
    fused = FusedHidden(model, [(part.weight, part.bias) for part in parts], gelu)
    model.hidden = fused  # type: ignore[method-assign]


def _replace(model: GPT, kind: type[M], make: Callable[[M, str | None], nn.Module]) -> None:
    """Put make(child, the GELU that follows it) in the place of each child of this kind."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                gelu = None
                if name == "c_fc" and isinstance(module.act, nn.GELU):
                    gelu, module.act = module.act.approximate, nn.Identity()
                module.register_module(name, make(child, gelu))
