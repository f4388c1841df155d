"""Log probabilities as the model itself sees them, for the rows that ask."""

from collections.abc import Sequence as Seq

from torch import Tensor

from nanogpt.engine.inverse_cdf import WIDTH
from nanogpt.request import TokenLogprobs

MAX_TOP_LOGPROBS = 20  # OpenAI's bound; always that many are looked for, so that rows stay
# independent of what others in the batch ask for
FLOOR = -9999.0  # stands for minus infinity, which JSON lacks


class Logprobs:
    """Log softmax of R rows of raw logits, and the likeliest tokens of each row.

    `logprobs` (R, n * WIDTH) is that log softmax, with padding behind the `vocab_size` tokens at
    -inf; `top` says whether some row wants the likeliest tokens as well.
    """

    def __init__(self, logprobs: Tensor, *, vocab_size: int, top: bool) -> None:
        self._logprobs = logprobs
        self._ids: list[list[int]] = [[]] * len(logprobs)
        self._values: list[list[float]] = [[]] * len(logprobs)
        if top:
            ids, values = likeliest(logprobs, min(MAX_TOP_LOGPROBS, vocab_size))
            self._ids = ids.tolist()
            self._values = values.clamp_(min=FLOOR).tolist()

    def of(self, token_ids: Tensor, counts: Seq[int]) -> list[TokenLogprobs]:
        """Row by row the entry of a token (R,), with the `counts[row]` likeliest ones."""
        own = self._logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).clamp_(min=FLOOR)
        return [
            TokenLogprobs(value, tuple(ids[:count]), tuple(values[:count]))
            for value, ids, values, count in zip(
                own.tolist(), self._ids, self._values, counts, strict=True
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
