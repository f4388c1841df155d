"""The average of the weights along a run, which is better than the last of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a model's parameters.

    Polyak and Juditsky (1992) with exponential weights. In the first steps the decay is
    (1 + step) / (10 + step) if that is less, so that the average soon forgets where it began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.params = dict(model.named_parameters())
        self.means: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step number `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.means.values()), [self.params[n] for n in self.means], 1 - decay
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averaged parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, param in self.params.items():
            param.data, self.means[name] = self.means[name], param.data
