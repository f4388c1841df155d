"""Log probabilities as the model itself sees them, for the rows that ask."""

from collections.abc import Sequence as Seq

from torch import Tensor

from nanogpt.request import TokenLogprobs

MAX_TOP_LOGPROBS = 20  # OpenAI's bound; always that many are looked for, so that rows stay
# independent of what others in the batch ask for
FLOOR = -9999.0  # stands for minus infinity, which JSON lacks


class Logprobs:
    """Log softmax of R rows of raw logits, and the likeliest tokens of each row.

    `logprobs` (R, V) is that log softmax, with padding behind the `vocab_size` tokens at -inf;
    `top` says whether some row wants the likeliest tokens as well.
    """

    def __init__(self, logprobs: Tensor, *, vocab_size: int, top: bool) -> None:
        self._logprobs = logprobs
        self._ids: list[list[int]] = [[]] * len(logprobs)
        self._values: list[list[float]] = [[]] * len(logprobs)
        if top:
            values, ids = logprobs.topk(min(MAX_TOP_LOGPROBS, vocab_size))
            ids, order = ids.sort(-1)  # equal values: lower id first
            values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
            self._ids = ids.gather(1, order).tolist()
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
