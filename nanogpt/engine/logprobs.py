"""Log probabilities as the model itself sees them, for the rows that ask."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from nanogpt.request import TokenLogprobs

MAX_TOP_LOGPROBS = 20  # OpenAI's bound; always that many are looked for, so that rows stay
# independent of what others in the batch ask for
FLOOR = -9999.0  # stands for minus infinity, which JSON lacks


class Logprobs:
    """log softmax (R, V) of raw logits (without padding), and the likeliest tokens of each row."""

    def __init__(self, logits: Tensor, top: bool) -> None:
        """`top`: some row wants the likeliest tokens as well."""
        self._logprobs = torch.log_softmax(logits, -1)
        self._ids: list[list[int]] = [[]] * len(logits)
        self._values: list[list[float]] = self._ids  # type: ignore[assignment]
        if top:
            values, ids = self._logprobs.topk(min(MAX_TOP_LOGPROBS, logits.size(1)))
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
