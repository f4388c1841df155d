"""The layers of a packed network in one call of C++: no time is lost in Python between them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.engine.attention import PagedAttend
from nanogpt.engine.cpu.backend import CPUBackend
from nanogpt.model.gpt import GPT, Attend


class FusedHidden:
    """`GPT.hidden` of a packed model, to the bit; sooner when its cache is our kernel's."""

    def __init__(
        self, model: GPT, layers: Sequence[tuple[Tensor, Tensor | None]], gelu: int
    ) -> None:
        """`layers` are weight and bias of ln_1, c_attn, c_proj, ln_2, c_fc, c_proj of each layer in
        turn, then of ln_f; `gelu` is a value of linear.GELU."""
        self._model = model
        self._layers = [t for pair in layers for t in (pair[0], _or_empty(pair[1]))]
        self._gelu, self._eps = gelu, model.ln_f.eps

    def __call__(self, idx: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if not (isinstance(attend, PagedAttend) and isinstance(attend.cache.backend, CPUBackend)):
            return GPT.hidden(self._model, idx, positions, attend)
        cache, metadata = attend.cache, attend.metadata
        return torch.ops.nanogpt_cpu.hidden(
            idx,
            self._model.wte.weight,
            self._model.wpe.weight,
            self._layers,
            cache.keys,
            cache.values,
            positions,
            metadata.slots,
            metadata.block_tables,
            metadata.sequence_of,
            self._model.config.n_head,
            self._gelu,
            self._eps,
        )


def _or_empty(bias: Tensor | None) -> Tensor:
    return torch.empty(0) if bias is None else bias
