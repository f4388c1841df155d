"""A loaded network made fast on a CPU: weights packed once, arithmetic in float32.

Weights stay in the type they were loaded in, which is what a small batch waits for; our kernels
(product.h) widen them in registers, exactly. Everything between the products is float32. A row's
answer is the same to the bit whatever other rows there are.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.engine.cpu import onednn
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.model.gpt import GPT, MLP

log = logging.getLogger(__name__)

GELU = {None: 0, "none": 1, "tanh": 2}  # enum class Gelu of gelu.h


class PackedLinear(nn.Module):
    """y = x W^T + b of an nn.Linear, then GELU if asked: (..., in) to (..., out), float32.

    The weights keep the type of `linear`: float32, bfloat16 or float16. `gelu` is the `approximate`
    of nn.GELU ("none" or "tanh"); None means no activation. Inference only.
    """

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.nanogpt_cpu.pack_weight(linear.weight.detach().contiguous())
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        self._gelu = GELU[gelu]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = torch.ops.nanogpt_cpu.linear(
            flat, self._weight, self._bias, self.out_features, self._gelu, None
        )
        return y.view(*x.shape[:-1], self.out_features)


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
def pack_model(model: GPT) -> None:
    """Replace every nn.Linear of a loaded model by its packed form, in place; GELU joins c_fc.

    The unpacked weights are dropped one by one, so memory does not double; of a tied head the
    embedding keeps its own copy. Without our kernels the weights become float32, for oneDNN;
    without that too the model multiplies as torch does, and the log says so.
    """
    dtype = model.wte.weight.dtype
    native = multiplies_natively(dtype)
    if not native:
        _widen(model)
    if not native and load_kernels():
        _replace(model, PackedLinear)
    elif native or onednn.has_products(torch.float32):
        _replace(model, onednn.OneDNNLinear)
        onednn.warn_of_dependence(model.h[0])
    else:
        model.float()
        log.warning("no packed products on this CPU: slower, and not bitwise stable")


def _widen(model: GPT) -> None:
    """Make everything but the products compute in float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                child.float()
            elif isinstance(child, nn.Embedding):
                module.register_module(name, WideEmbedding(child))


def _replace(model: GPT, packed: Callable[[nn.Linear, str | None], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                gelu = module.act.approximate if isinstance(module, MLP) else None
                module.register_module(name, packed(child, gelu if name == "c_fc" else None))
    for module in model.modules():
        if isinstance(module, MLP):
            module.register_module("act", nn.Identity())
