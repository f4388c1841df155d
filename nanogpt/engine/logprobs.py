"""Log probabilities as the model itself sees them, for the rows that ask."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from nanogpt.engine.inverse_cdf import WIDTH
from nanogpt.request import TokenLogprobs

MAX_TOP_LOGPROBS = 20  # OpenAI's bound; always that many are looked for, so that rows stay
# independent of what others in the batch ask for
FLOOR = -9999.0  # stands for minus infinity, which JSON lacks


def logprobs_of(
    logits: Tensor, rows: Tensor, token_ids: Tensor, counts: Seq[int], vocab_size: int
) -> list[TokenLogprobs]:
    """Entries of one token in each of some rows (R,), with the `counts[r]` likeliest ones.

    In torch; `logits` (B, n * WIDTH) are float32 with -inf behind the tokens. Entries of rows that
    are no distribution have no meaning.
    """
    logprobs = torch.log_softmax(logits if len(rows) == len(logits) else logits[rows], -1)
    own = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    ids = values = logprobs[:, :0]
    if any(counts):
        ids, values = likeliest(logprobs, min(MAX_TOP_LOGPROBS, vocab_size))
    return _entries(own, ids, values, counts)


def logprobs_by_kernel(
    logits: Tensor, rows: Tensor, token_ids: Tensor, counts: Seq[int], vocab_size: int
) -> list[TokenLogprobs]:
    """The same in C++ (nanogpt/engine/cpu/logprobs.h), but for rounding; logits of any width from
    `vocab_size` on, and any type."""
    top = min(max(counts), vocab_size)
    own, ids, values = torch.ops.nanogpt_cpu.logprobs(logits, vocab_size, rows, token_ids, top)
    return _entries(own, ids, values, counts)


def _entries(own: Tensor, ids: Tensor, values: Tensor, counts: Seq[int]) -> list[TokenLogprobs]:
    """From log probabilities (R,), and ids and log probabilities (R, n) of the likeliest."""
    return [
        TokenLogprobs(value, tuple(ids[:count]), tuple(values[:count]))
        for value, ids, values, count in zip(
            own.clamp_(min=FLOOR).tolist(),
            ids.tolist(),
            values.clamp_(min=FLOOR).tolist(),
            counts,
            strict=True,
        )
    ]


def likeliest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and values (R, count) of the greatest numbers of each row of (R, n * WIDTH), descending,
    of equal ones the lower id first.

    They are all in the `count` blocks with the greatest maxima, so only those are searched: a
    tenth of the time. A row's own blocks decide, so rows stay independent.
    """
    blocks = x.view(len(x), -1, WIDTH)
    best = blocks.amax(-1).topk(min(count, blocks.size(1))).indices  # (R, count)
    found = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, WIDTH)).flatten(1)
    values, at = found.topk(count)
    ids, order = (best.gather(1, at // WIDTH) * WIDTH + at % WIDTH).sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values
