"""Drawing tokens: inverse transform sampling with one uniform for each row.

Probabilities become 52-bit fixed point before they are summed. Integer sums have no rounding, so
a row's result depends neither on the batch, nor on the order of a parallel scan, and a token of
probability zero has an interval of length zero: it can't be drawn, whatever the uniform.
"""

import numpy as np
import torch
from torch import Tensor

WIDTH = 128  # the walk is over sums of this many tokens first, then inside one such block
SCALE = 2.0**52
HEAD = 1024  # likeliest tokens that are looked at first; few nuclei are larger


def padded_width(vocab_rows: int) -> int:
    """Columns that `draw` wants for so many tokens; the additional ones are to be 0."""
    return -(-vocab_rows // WIDTH) * WIDTH


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Token ids (B,) for probabilities (B, padded_width) and uniforms (B,) in [0, 1), float64."""
    blocks = probs.view(len(probs), -1, WIDTH)
    sums = _fixed_point(blocks.sum(-1)).cumsum(-1)  # (B, V / WIDTH)
    target = _target(u, sums[:, -1:])
    block = torch.searchsorted(sums, target, right=True)  # (B, 1)
    target -= torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, WIDTH)).squeeze(1)
    inside = _fixed_point(inside).cumsum(-1)  # (B, WIDTH)
    # A block's float sum and its integer sum differ in the last bits.
    target = torch.minimum(target, inside[:, -1:] - 1)
    return (block * WIDTH + torch.searchsorted(inside, target, right=True)).squeeze(1)


def draw_filtered(probs: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Token ids (B,) among the likeliest tokens of each row of probs (B, V).

    u, top_p and min_p are (B,) float64, top_k is (B,) int64.

    Tokens are ranked by probability, then by id (lower first). Kept are those with at least
    `min_p` times the greatest probability, of these the first `top_k` (0: all), of these the
    shortest beginning whose share of their probability reaches `top_p`, and always the first: the
    definitions and the order of vLLM (sample/ops/topk_topp_sampler.py, min-p before).
    """
    ascending = _sort(probs)
    found = None
    if probs.size(1) > HEAD and probs.device.type == "cpu":  # a GPU would wait for the answer
        found = _draw_sorted(ascending, HEAD, u, top_k, top_p, min_p)
    if found is None:
        found = _draw_sorted(ascending, probs.size(1), u, top_k, top_p, min_p)
    assert found is not None
    return _nth_with_value(probs, *found)


def _draw_sorted(
    ascending: Tensor, width: int, u: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(probability of the drawn token, its rank among the equal ones), looking at the last `width`
    columns only; None if some row's choice could lie outside of them."""
    vocab = ascending.size(1)
    head = ascending[:, vocab - width :].contiguous()  # (B, width), likeliest last
    sums = _fixed_point(head).cumsum(-1)
    above = sums[:, -1:] - sums  # mass of the likelier ones, (B, width)
    rank = torch.arange(width - 1, -1, -1, device=head.device)  # 0 is the likeliest
    limit = torch.where(top_k > 0, top_k, vocab).unsqueeze(1)
    kept = (head >= min_p.float().unsqueeze(1) * head[:, -1:]) & (rank < limit)
    # With nothing cut so far the mass is 1: the row is a softmax.
    cut = (min_p.unsqueeze(1) > 0) | (limit < vocab)
    mass = torch.where(cut, sums[:, -1:] - _below(sums, kept), SCALE)
    share = torch.where(top_p < 1, top_p, torch.inf).unsqueeze(1)
    nucleus = kept & (above < share * mass)
    nucleus[:, -1] = True
    if width < vocab and bool((torch.where(cut, kept, nucleus)[:, 0]).any()):
        return None
    below = _below(sums, nucleus)
    target = below + _target(u, sums[:, -1:] - below)
    at = torch.searchsorted(sums, target, right=True)  # (B, 1)
    value = head.gather(1, at)
    last_equal = torch.searchsorted(head, value, right=True) - 1
    return value, (last_equal - at).squeeze(1)


def _below(sums: Tensor, kept: Tensor) -> Tensor:
    """Fixed-point mass (B, 1) of the tokens before the kept ones, which are a row's last."""
    first = kept.size(1) - kept.sum(-1, keepdim=True)
    return torch.where(first > 0, sums.gather(1, (first - 1).clamp_(min=0)), 0)


def _nth_with_value(probs: Tensor, value: Tensor, nth: Tensor) -> Tensor:
    """In each row of (B, V) the id of the nth (from 0) token with probability `value` (B, 1)."""
    rows, ids = (probs == value).nonzero(as_tuple=True)
    first = torch.searchsorted(rows, torch.arange(len(probs), device=probs.device))
    return ids[first + nth]


def _sort(probs: Tensor) -> Tensor:
    """Each row in ascending order. NumPy's SIMD sort is ten times as fast as torch's on a CPU."""
    if probs.device.type == "cpu":
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1))
    return probs.sort(-1).values


def _fixed_point(x: Tensor) -> Tensor:
    """int64, rounded up: whatever has a probability keeps one."""
    return x.double().mul_(SCALE).ceil_().long()


def _target(u: Tensor, total: Tensor) -> Tensor:
    """Where in [0, total) the uniforms (B,) point to; total is (B, 1)."""
    return torch.minimum((u.unsqueeze(1) * total).long(), total - 1)
