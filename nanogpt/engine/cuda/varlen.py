"""torch's own attention over blocks as a backend: FlashAttention, where it takes these blocks.

`varlen_attn` has block tables from torch 2.13 on. The FlashAttention 2 that torch carries wants
pages of a multiple of 256 tokens, so this is for an engine.block_size of 256.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from nanogpt.engine.attention import AttentionMetadata, TorchBackend

log = logging.getLogger(__name__)

PAGE = 256  # tokens
LARGEST_HEAD, HEAD_STEP = 256, 8
NEEDED = {"block_table", "seqused_k"}


class VarlenBackend(TorchBackend):
    """FlashAttention over the cache of TorchBackend. Rows agree with others to rounding."""

    name = "varlen"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        self.write(k, v, key, value, meta)
        out = varlen.varlen_attn(q, key, value, **arguments(meta))
        assert isinstance(out, Tensor)  # no more was asked for
        return out


def arguments(meta: AttentionMetadata) -> dict[str, Any]:
    """What `varlen_attn` wants to know. Causal there means that the last row of a sequence sees
    all its keys, the one before one less, and so on: just our chunks."""
    return {
        "cu_seq_q": meta.row_ends,
        "cu_seq_k": None,
        "max_q": max(meta.host_counts),
        "max_k": meta.host_max_keys,
        "window_size": (-1, 0),
        "seqused_k": meta.key_counts,
        "block_table": meta.block_tables,
    }


def fits(device: torch.device, dtype: torch.dtype, block_size: int, head_size: int) -> bool:
    """Whether this torch, this GPU and this cache go together; tried on a few rows."""
    return (
        inspect.signature(varlen.varlen_attn).parameters.keys() >= NEEDED
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and block_size % PAGE == 0
        and head_size % HEAD_STEP == 0
        and head_size <= LARGEST_HEAD
        and _works(device, dtype, block_size, head_size)
    )


def _works(device: torch.device, dtype: torch.dtype, block_size: int, head_size: int) -> bool:
    q, k, v = torch.ones(3, 2, 1, head_size, dtype=dtype, device=device)
    key, value = torch.ones(2, 1, block_size, 1, head_size, dtype=dtype, device=device)
    meta = AttentionMetadata(
        positions=torch.arange(2, device=device),
        slots=torch.arange(2, device=device),
        block_tables=torch.zeros(1, 1, dtype=torch.int32, device=device),
        sequence_of=torch.zeros(2, dtype=torch.int32, device=device),
        query_counts=[2],
        max_keys=2,
    )
    try:
        VarlenBackend().attend(q, k, v, key, value, meta).sum().item()
    except RuntimeError as error:
        log.info("varlen_attn does not take block tables here: %s", error)
        return False
    return True
