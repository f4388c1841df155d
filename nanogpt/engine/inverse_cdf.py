"""Drawing tokens: inverse transform sampling with one uniform for each row.

Probabilities become 52-bit fixed point before they are summed. Integer sums have no rounding, so
a row's result depends neither on the batch, nor on the order of a parallel scan, and a token of
probability zero has an interval of length zero: it can't be drawn, whatever the uniform.
"""

import numpy as np
import torch
from torch import Tensor

WIDTH = 128  # tokens in a block: sums are taken over blocks first, then inside a single one
SCALE = 2.0**52


def padded_width(vocab_rows: int) -> int:
    """Columns that probabilities need here for so many tokens; the additional ones are 0."""
    return -(-vocab_rows // WIDTH) * WIDTH


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Token ids (B,) for probabilities (B, padded_width) and uniforms (B,) in [0, 1), float64."""
    ladder = _Ladder(probs)
    return ladder.find(_scaled(u, ladder.total)).squeeze(1)


def draw_filtered(probs: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Token ids (B,) among the likeliest tokens of each row of probs (B, padded_width).

    u, top_p and min_p are (B,) float64, top_k is (B,) int64.

    Tokens are ranked by probability, then by id (lower first). Kept are those with at least
    `min_p` times the greatest probability, of these the first `top_k` (0: all), of these the
    shortest beginning whose share of their probability reaches `top_p`, and always the first: the
    definitions and the order of vLLM (sample/ops/topk_topp_sampler.py, min-p before).
    """
    ascending = _sort(probs)
    ladder = _Ladder(ascending)
    total = ladder.total
    least = min_p.float().unsqueeze(1) * ascending[:, -1:]
    by_rank = torch.where(top_k > 0, probs.size(1) - top_k, 0).clamp_(min=0).unsqueeze(1)
    first = torch.maximum(torch.searchsorted(ascending, least), by_rank)  # (B, 1)
    # With nothing cut so far the mass is 1: the row is a softmax.
    is_cut = ((top_k > 0) | (min_p > 0)).unsqueeze(1)
    mass = torch.where(is_cut, total - ladder.before(first), SCALE)
    nucleus = (top_p.unsqueeze(1) * mass).ceil_().long()
    by_mass = ladder.find((total - nucleus).clamp_(min=0))
    first = torch.where(top_p.unsqueeze(1) < 1, torch.maximum(first, by_mass), first)
    below = ladder.before(first)
    at = ladder.find(below + _scaled(u, total - below))
    return _unsort(probs, ascending, torch.maximum(at, first))  # sums are rounded: stay inside


class _Ladder:
    """Cumulative sums of the rows of (B, n * WIDTH), in fixed point, block by block.

    Only sums of blocks are kept; those inside a block are taken when a row needs them. A block's
    own sum is rounded to float, so the two differ in their last bits; `find` copes with that.
    """

    def __init__(self, probs: Tensor) -> None:
        self._blocks = probs.view(len(probs), -1, WIDTH)
        self._ends = _fixed_point(self._blocks.sum(-1)).cumsum(-1)  # (B, n)

    @property
    def total(self) -> Tensor:
        """(B, 1)"""
        return self._ends[:, -1:]

    def find(self, target: Tensor) -> Tensor:
        """The tokens (B, 1) in whose intervals the targets (B, 1) lie: from 0 to total, the total
        itself counting as just below it."""
        target = torch.minimum(target, self.total - 1)
        block = torch.searchsorted(self._ends, target, right=True)
        inside = self._inside(block)
        rest = torch.minimum(target - self._start(block), inside[:, -1:] - 1)
        return block * WIDTH + torch.searchsorted(inside, rest, right=True)

    def before(self, index: Tensor) -> Tensor:
        """Sums (B, 1) of all tokens before the ones at `index` (B, 1)."""
        block, offset = index // WIDTH, index % WIDTH
        inside = self._inside(block).gather(1, (offset - 1).clamp_(min=0))
        return self._start(block) + torch.where(offset > 0, inside, 0)

    def _start(self, block: Tensor) -> Tensor:
        return torch.where(block > 0, self._ends.gather(1, (block - 1).clamp_(min=0)), 0)

    def _inside(self, block: Tensor) -> Tensor:
        """Cumulative sums (B, WIDTH) inside of one block of each row."""
        values = self._blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, WIDTH)).squeeze(1)
        return _fixed_point(values).cumsum(-1)


def _unsort(probs: Tensor, ascending: Tensor, at: Tensor) -> Tensor:
    """Ids (B,) of the tokens that are at `at` (B, 1) in the sorted rows."""
    value = ascending.gather(1, at)
    nth = torch.searchsorted(ascending, value, right=True) - 1 - at  # among the equal ones, from 0
    equal = _where_equal(probs, value)
    row_starts = torch.arange(len(probs), device=probs.device) * probs.size(1)
    return equal[torch.searchsorted(equal, row_starts) + nth.squeeze(1)] - row_starts


# NumPy's sort and nonzero use SIMD and are ten times as fast as torch's on a CPU.


def _sort(probs: Tensor) -> Tensor:
    """Each row in ascending order."""
    if probs.device.type == "cpu":
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1))
    return probs.sort(-1).values


def _where_equal(probs: Tensor, value: Tensor) -> Tensor:
    """Places in the flattened rows (B, V) that equal their row's value (B, 1), ascending."""
    if probs.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(probs.numpy() == value.numpy()))
    return (probs == value).view(-1).nonzero().squeeze(1)


def _fixed_point(x: Tensor) -> Tensor:
    """int64, rounded up: whatever has a probability keeps one."""
    return x.double().mul_(SCALE).ceil_().long()


def _scaled(u: Tensor, total: Tensor) -> Tensor:
    """Where in 0..total (B, 1) the uniforms (B,) point to."""
    return (u.unsqueeze(1) * total).long()
