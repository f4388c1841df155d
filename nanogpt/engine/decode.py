"""Decode steps without the host: what a step brings forth is what the next one starts from.

A step reads and writes static tensors only, so a GPU can record it once for a number of rows and
then repeat it (see cuda/graphs.py), many times without anybody on the host looking:

    token_ids, positions ──► network ──► logits ──► a token for each row ──► token_ids
    block_tables, limits       │                      │                      positions + 1
                               ▼                      ▼
                            KV cache               sampled[step]

A row that has no more tokens to give goes on idly: at its limit it stays where it is, and its keys
and values go to a block that belongs to nobody. So do rows that only fill a batch up.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.engine.attention import AttentionMetadata
from nanogpt.engine.inverse_cdf import draw, padded_width, shares_of
from nanogpt.engine.sampler import NO_TOKEN, argmax
from nanogpt.engine.transfer import Fetched, copy_in

# Token ids (N,) and where they belong to logits (N, at least vocab_size).
Network = Callable[[Tensor, AttentionMetadata], Tensor]

IDLE = -1  # the limit of a row that computes nothing


class DecodeState:
    """The static tensors of up to `max_rows` rows and `max_steps` steps between two looks."""

    def __init__(
        self, *, max_rows: int, max_steps: int, max_blocks: int, device: torch.device
    ) -> None:
        # token_ids, positions, limits: the last position that each row may compute
        self.numbers = torch.zeros(3, max_rows, dtype=torch.long, device=device)
        self.numbers[2] = IDLE
        self.block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self.uniforms = torch.zeros(max_steps, max_rows, dtype=torch.float64, device=device)
        self.scale = torch.zeros(max_rows, device=device)  # 1 / temperature; 0: greedy
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.sampled = torch.zeros(max_steps, max_rows, dtype=torch.long, device=device)

    @property
    def max_steps(self) -> int:
        return len(self.sampled)


class DecodeStep:
    """One token for each of the first rows of a state, by nothing but tensor operations."""

    def __init__(
        self,
        network: Network,
        state: DecodeState,
        *,
        block_size: int,
        spare_block: int,
        vocab_size: int,
    ) -> None:
        self._network, self._state = network, state
        self._block_size, self._spare_block = block_size, spare_block
        self._vocab_size = vocab_size

    def __call__(self, rows: int) -> None:
        state = self._state
        token_ids, positions, _ = state.numbers[:, :rows]
        logits = self._network(token_ids, self._metadata(rows))
        uniforms = state.uniforms.index_select(0, state.step)[0, :rows]
        tokens = choose(logits, uniforms, state.scale[:rows], self._vocab_size)
        state.sampled[:, :rows].index_copy_(0, state.step, tokens.unsqueeze(0))
        token_ids.copy_(tokens.clamp(min=0))  # NO_TOKEN has no embedding
        positions.add_(1)
        state.step.add_(1).remainder_(state.max_steps)  # which only trials get to

    def _metadata(self, rows: int) -> AttentionMetadata:
        state, size = self._state, self._block_size
        _, positions, limits = state.numbers[:, :rows]
        at = torch.minimum(positions, limits).clamp_(min=0)
        tables = state.block_tables[:rows]
        blocks = tables.gather(1, (at // size).unsqueeze(1)).squeeze(1)
        blocks = torch.where(positions <= limits, blocks, self._spare_block)
        return AttentionMetadata(
            positions=at,
            slots=blocks.long() * size + at % size,
            block_tables=tables,
            sequence_of=torch.arange(rows, dtype=torch.int32, device=at.device),
            query_counts=[1] * rows,
            max_keys=tables.size(1) * size,
        )


def choose(logits: Tensor, uniforms: Tensor, scale: Tensor, vocab_size: int) -> Tensor:
    """Token ids (B,), NO_TOKEN where a row is not finite: what the sampler's definition gives for
    rows of a temperature and nothing else, without the host's help.

    `logits` (B, at least vocab_size) are the model's own; `uniforms` (B,) float64; `scale` (B,) is
    1 / temperature, 0 for greedy.
    """
    logits = logits[:, :vocab_size].float()
    logits = F.pad(logits, (0, padded_width(vocab_size) - vocab_size), value=-torch.inf)
    broken = ~logits.amax(-1).isfinite()
    logits = logits.masked_fill(broken.unsqueeze(1), 0)  # no distribution: let it pass
    greedy = argmax(logits)
    is_random = scale > 0
    shares = shares_of(logits, torch.where(is_random, scale, 1), vocab_size)
    return torch.where(is_random, draw(shares, uniforms), greedy).masked_fill_(broken, NO_TOKEN)


class Decoder:
    """Steps of a state, by numbers from the host. Calls return before the device has worked.

    `step` computes the first n rows, for an n of `buckets` (ascending).
    """

    def __init__(
        self, step: Callable[[int], None], state: DecodeState, buckets: Sequence[int]
    ) -> None:
        self._step, self._state, self.buckets = step, state, buckets
        self.max_steps, self.max_blocks = state.max_steps, state.block_tables.size(1)

    def bucket(self, rows: int) -> int:
        """With how many rows so many are computed."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    @torch.inference_mode()
    def start(self, token_ids: np.ndarray, positions: np.ndarray, scale: np.ndarray) -> None:
        """Rows that the device doesn't know: what to compute first, and where; (n,) each."""
        rows = len(token_ids)
        copy_in(np.stack([token_ids, positions]), self._state.numbers[:2, :rows])
        copy_in(scale.astype(np.float32), self._state.scale[:rows])

    @torch.inference_mode()
    def run(self, block_tables: np.ndarray, limits: np.ndarray, uniforms: np.ndarray) -> Fetched:
        """A token for each row and step, from where the last one left off: (steps, n).

        `block_tables` (n, max_blocks) int32; `limits` (n,); `uniforms` (steps, n).
        """
        state, (steps, rows) = self._state, uniforms.shape
        bucket = self.bucket(rows)
        idle = np.full(bucket - rows, IDLE)
        copy_in(np.concatenate([limits, idle]), state.numbers[2, :bucket])
        copy_in(block_tables, state.block_tables[:rows])
        copy_in(uniforms, state.uniforms[:steps, :rows])
        state.step.zero_()
        for _ in range(steps):
            self._step(bucket)
        return Fetched(state.sampled[:steps, :rows].contiguous())


def power_buckets(most: int) -> list[int]:
    """1, 2, 4, ... and `most`: a batch is at most half idle."""
    return [2**i for i in range((most - 1).bit_length())] + [most]
