"""Drawing tokens in plain torch: inverse transform sampling with one uniform for each row.

A token's share is exp((logit - greatest logit) / temperature), 1 for the likeliest, rounded to a
grid on which the sum over a whole vocabulary is exact in float64. So sums don't depend on the
batch or on the order of a parallel scan, and a token whose share is zero has an interval of length
zero: it can't be drawn, whatever the uniform. For GPT-2's vocabulary the grid is 2**-37: what is
26 nats below the likeliest token is as good as banned.

This is the definition. On CPUs with a compiler nanogpt/engine/cpu/sampling.h does the same, much
faster; its exp differs from torch's in the last bit now and then.
"""

import numpy as np
import torch
from torch import Tensor

WIDTH = 128  # tokens in a block: sums are taken over blocks first, then inside a single one


def padded_width(vocab_rows: int) -> int:
    """Columns that shares need here for so many tokens; the additional ones are 0."""
    return -(-vocab_rows // WIDTH) * WIDTH


def grid(vocab_size: int) -> float:
    """What shares are multiples of: 2**53 of it are more than a vocabulary can sum up to."""
    return 2.0 ** max(vocab_size.bit_length() - 53, -46)


def shares_of(logits: Tensor, scale: Tensor, vocab_size: int) -> Tensor:
    """Shares of logits (B, padded_width), float32, in place; `scale` (B,) is 1 / temperature.

    Each row needs a finite maximum. Minus infinity is fine, and what padding must be.
    """
    magic = grid(vocab_size) * 2**23  # a float32 of this size has the grid as its last bit
    logits.sub_(logits.amax(-1, keepdim=True)).mul_(scale.unsqueeze(1))
    return logits.exp_().add_(magic).sub_(magic)


def draw(shares: Tensor, u: Tensor) -> Tensor:
    """Token ids (B,) for shares (B, padded_width) and uniforms (B,) in [0, 1), float64."""
    blocks = shares.view(len(shares), -1, WIDTH)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, n)
    total = ends[:, -1:]
    target = torch.minimum(u.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(ends, target, right=True)  # (B, 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, WIDTH)).squeeze(1)
    inside = inside.double().cumsum_(-1).add_(start)  # (B, WIDTH)
    return (block * WIDTH + torch.searchsorted(inside, target, right=True)).squeeze(1)


def keep(shares: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The shares (B, padded_width) of each row's likeliest tokens, and 0 for all others.

    Tokens are ranked by share, then by id (lower first). Kept are those with at least `min_p`
    (B,) float32 of the greatest share, of these the first `top_k` (B,) int64 (0: all), of these
    the shortest beginning whose part of their sum reaches `top_p` (B,) float64, and always the
    first: the definitions and the order of vLLM (sample/ops/topk_topp_sampler.py, min-p before).
    """
    ascending = _sort(shares)
    sums = ascending.flip(-1).cumsum(-1, dtype=torch.float64)  # (B, V), likeliest first
    width = shares.size(1)
    count = width - torch.searchsorted(ascending, min_p.unsqueeze(1))  # (B, 1)
    count = torch.where(top_k.unsqueeze(1) > 0, count.minimum(top_k.unsqueeze(1)), count)
    nucleus = top_p.unsqueeze(1) * sums.gather(1, count - 1)
    by_sum = torch.searchsorted(sums, nucleus) + 1
    count = torch.where(top_p.unsqueeze(1) < 1, count.minimum(by_sum), count)
    least = ascending.gather(1, width - count)
    greater = width - torch.searchsorted(ascending, least, right=True)
    equal = shares == least
    is_kept = (shares > least) | (equal & (equal.cumsum(-1) <= count - greater))
    return shares.masked_fill(~is_kept, 0)


def _sort(shares: Tensor) -> Tensor:
    """Each row in ascending order. NumPy's sort uses SIMD: ten times as fast as torch's."""
    if shares.device.type == "cpu":
        return torch.from_numpy(np.sort(shares.numpy(), axis=-1))
    return shares.sort(-1).values
