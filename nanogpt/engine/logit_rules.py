"""What a request changes about its logits before a token is drawn: penalties, bias, bans.

On CPUs nanogpt/engine/cpu/rules.h does the same, to the bit.

In this order: repetition penalty (Keskar et al., "CTRL", 2019, section 4.1, as Hugging Face and
vLLM apply it: prompt and output), presence and frequency penalties (OpenAI: output only),
logit bias, and no end or stop token before min_tokens.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nanogpt.engine.sequence import Sequence
from nanogpt.engine.token_counts import TokenCounts
from nanogpt.engine.transfer import to_device


class LogitRules:
    """The rules of a batch of sequences. Rows without any cost nothing; rows are independent."""

    def __init__(
        self, seqs: list[Sequence], eos_token_id: int | None, device: torch.device
    ) -> None:
        self._device, self._eos_token_id, self._num_rows = device, eos_token_id, len(seqs)
        self._penalised = [(row, seq) for row, seq in enumerate(seqs) if seq.params.is_penalised]
        self._biased = [(row, seq) for row, seq in enumerate(seqs) if seq.params.logit_bias]
        self._minimum = [(row, seq) for row, seq in enumerate(seqs) if seq.params.min_tokens]
        self.exist = bool(self._penalised or self._biased or self._minimum)

    def apply(self, logits: Tensor) -> None:
        """Change contiguous logits (B, V), in place."""
        if self._penalised:
            self._apply_penalties(logits)
        if self._biased:
            self._apply_bias(logits)
        if self._minimum:
            self._ban_ends(logits)

    def tensors(self) -> list[Tensor]:
        """The rules as the kernels take them: struct Rules of rules.h, member by member. Those of
        the next token of each sequence; all of them are on the host."""
        rows = [row for row, _ in self._penalised]
        seen = [_counts(seq) for _, seq in self._penalised]
        return [
            self._ends(rows, [len(each.ids) for each in seen]),
            _joined((each.ids for each in seen), np.int64),
            _joined((each.counts for each in seen), np.float32),
            *self._fixed_tensors,
        ]

    @cached_property
    def _fixed_tensors(self) -> list[Tensor]:
        """What is the same at every step."""
        penalties = np.tile(np.array([1, 0, 0], np.float32), (self._num_rows, 1))
        for row, seq in self._penalised:
            penalties[row] = _penalties(seq)
        biased = [seq.params.logit_bias for _, seq in self._biased]
        ends = [seq.end_token_ids(self._eos_token_id) for _, seq in self._minimum]
        minimum = np.zeros(self._num_rows, np.int64)
        for row, seq in self._minimum:
            minimum[row] = seq.params.min_tokens
        return [
            torch.from_numpy(penalties),
            self._ends([row for row, _ in self._biased], [len(each) for each in biased]),
            _joined(([*each] for each in biased), np.int64),
            _joined(([*each.values()] for each in biased), np.float32),
            self._ends([row for row, _ in self._minimum], [len(each) for each in ends]),
            _joined(ends, np.int64),
            torch.from_numpy(minimum),
        ]

    def _ends(self, rows: list[int], sizes: list[int]) -> Tensor:
        """Where each row's part ends (B,), when the parts of `rows` are of these sizes."""
        ends = np.zeros(self._num_rows, np.int64)
        ends[rows] = sizes
        return torch.from_numpy(ends.cumsum())

    def _apply_penalties(self, logits: Tensor) -> None:
        width, flat = logits.size(1), logits.view(-1)
        counts = [_counts(seq) for _, seq in self._penalised]
        sizes = [len(each.ids) for each in counts]
        at = self._tensor(
            np.concatenate(
                [c.ids + row * width for c, (row, _) in zip(counts, self._penalised, strict=True)]
            )
        )
        count = self._tensor(np.concatenate([c.counts for c in counts]))
        params = [_penalties(seq) for _, seq in self._penalised]
        repetition, frequency, presence = self._tensor(
            np.repeat(np.array(params, np.float32).T, sizes, axis=1)
        )
        value = flat[at]
        value = torch.where(value > 0, value / repetition, value * repetition)
        flat[at] = value - count * frequency - (count > 0) * presence

    def _apply_bias(self, logits: Tensor) -> None:
        width, flat = logits.size(1), logits.view(-1)
        ids = [row * width + i for row, seq in self._biased for i in seq.params.logit_bias]
        bias = [value for _, seq in self._biased for value in seq.params.logit_bias.values()]
        at = self._tensor(np.array(ids, np.int64))
        flat[at] += self._tensor(np.array(bias, np.float32))

    def _ban_ends(self, logits: Tensor) -> None:
        width, flat = logits.size(1), logits.view(-1)
        banned = [
            row * width + token_id
            for row, seq in self._minimum
            if seq.output_len < seq.params.min_tokens
            for token_id in seq.end_token_ids(self._eos_token_id)
            if token_id < width
        ]
        if banned:
            flat[self._tensor(np.array(banned, np.int64))] = -torch.inf

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self._device)


def _joined(parts: Iterable[np.ndarray | Seq], kind: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, kind), *parts], dtype=kind))


def _penalties(seq: Sequence) -> tuple[float, float, float]:
    p = seq.params
    return p.repetition_penalty, p.frequency_penalty, p.presence_penalty


def _counts(seq: Sequence) -> TokenCounts:
    """The sequence's counts, made on first use; whoever appends a token keeps them up to date."""
    if seq.counts is None:
        tokens, prompt_len = seq.dropped + seq.tokens, len(seq.dropped) + seq.prompt_len
        seen = tokens[:prompt_len] if seq.params.repetition_penalty != 1 else ()
        seq.counts = TokenCounts(seen, tokens[prompt_len:])
    return seq.counts
