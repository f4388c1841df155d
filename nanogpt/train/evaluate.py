"""Loss on a split: the same windows every time, without dropout."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch.nn import functional as F

from nanogpt.data.dataset import batch_at, chunks, evaluation_starts
from nanogpt.model.gpt import GPT, CausalAttend

_BATCH = 16  # sequences; a matter of memory only


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: np.ndarray,
    windows: int = 0,
    autocast: Callable[[], AbstractContextManager[object]] | None = None,
    vocab_size: int | None = None,
) -> float:
    """Mean loss, in nats a token, over `windows` windows of a split (0: all of it). Rows of the
    embedding beyond `vocab_size` are padding, which no text has: they are left out."""
    was_training = model.training
    model.eval()
    device = model.wte.weight.device
    block_size = model.config.block_size
    starts = evaluation_starts(len(tokens), block_size, windows)
    total = 0.0
    for part in chunks(starts, _BATCH):
        x, y = (t.to(device) for t in batch_at(tokens, part, block_size))
        if autocast is None:
            logits = model(x, CausalAttend())
        else:
            with autocast():
                logits = model(x, CausalAttend())
        logits = logits[..., :vocab_size]
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(starts) * block_size)
