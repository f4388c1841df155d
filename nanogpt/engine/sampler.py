"""Logits in, one token for each sequence out. A row's result depends on that row alone."""

from collections.abc import Sequence as Seq
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.inverse_cdf import WIDTH, draw, keep, padded_width, shares_of
from nanogpt.engine.logit_rules import LogitRules
from nanogpt.engine.logprobs import logprobs_by_kernel, logprobs_of
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.transfer import to_device
from nanogpt.engine.uniforms import stream_key, uniforms
from nanogpt.request import TokenLogprobs
from nanogpt.sampling_params import SamplingParams

NO_TOKEN = -1  # there is none to sample
MIN_TEMPERATURE = 1e-5  # below, logits / temperature could overflow; as good as greedy


class Sampler:
    """Samples for one model. Keeps its buffers, and what it knows of the last batch, for the next.

    The first `vocab_size` logits of a row are tokens; whatever comes after them is padding.
    `kernels` says whether to use the C++ sampler; by default that is done where there is one.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_id: int | None,
        device: torch.device,
        kernels: bool | None = None,
    ) -> None:
        self._vocab_size, self._eos_token_id, self._device = vocab_size, eos_token_id, device
        if kernels is None:
            kernels = device.type == "cpu" and load_kernels()
        self._has_kernels = kernels
        width = padded_width(vocab_size)
        self._logits = _Buffer(width, device)
        self._plan = _Plan([], eos_token_id, device)

    def sample(
        self, logits: Tensor, seqs: list[Sequence]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens and, for sequences that want them, log probabilities, parallel to `seqs`.

        `logits` (B, at least vocab_size) are the model's own; they are overwritten. A row that is
        not finite, or in which every token is banned, gets NO_TOKEN.
        """
        plan = self._plan_for(seqs)
        choose = self._choose if self._has_kernels else self._choose_in_torch
        token_ids, entries = choose(logits, plan)
        logprobs: list[TokenLogprobs | None] = [None] * len(seqs)
        for row, entry in zip(plan.report, entries, strict=True):
            logprobs[row] = entry
        return token_ids.tolist(), logprobs

    def logprobs(self, logits: Tensor, token_ids: Tensor, counts: Seq[int]) -> list[TokenLogprobs]:
        """Entries of one token (R,) in each row of the model's own logits (R, at least
        vocab_size), with the `counts[r]` likeliest ones. The logits are overwritten."""
        rows = torch.arange(len(logits), device=self._device)
        return self._logprobs_of(logits, rows, token_ids, counts)

    def _logprobs_of(
        self, logits: Tensor, rows: Tensor, token_ids: Tensor, counts: Seq[int]
    ) -> list[TokenLogprobs]:
        if self._has_kernels:
            return logprobs_by_kernel(logits, rows, token_ids, counts, self._vocab_size)
        logits = self._without_padding(logits)
        return logprobs_of(logits, rows, token_ids, counts, self._vocab_size)

    def _without_padding(self, logits: Tensor) -> Tensor:
        """The logits in float32 with -inf for what is no token: (B, padded_width(vocab_size)).

        In place if they have that form already.
        """
        size = self._vocab_size
        if logits.dtype != torch.float32 or logits.size(1) != self._logits.width:
            buffer = self._logits.get(len(logits))
            buffer[:, :size] = logits[:, :size]
            logits = buffer
        logits[:, size:] = -torch.inf
        return logits

    def _plan_for(self, seqs: list[Sequence]) -> "_Plan":
        if self._plan.seqs != seqs:
            self._plan = _Plan([*seqs], self._eos_token_id, self._device)
        return self._plan

    def _choose(self, logits: Tensor, plan: "_Plan") -> tuple[Tensor, list[TokenLogprobs]]:
        """Token ids (B,), NO_TOKEN where there is none, and the entries of the rows that report."""
        if plan.rules.exist and logits.dtype != torch.float32:
            logits = self._without_padding(logits)
        token_ids = torch.ops.nanogpt_cpu.sample(  # leaves the logits as they are
            logits,
            self._vocab_size,
            plan.keys,
            torch.tensor(plan.positions()),
            plan.scale,
            plan.top_k,
            plan.top_p,
            plan.min_p,
            plan.rules.tensors() if plan.rules.exist else [],
        )
        if not plan.report:
            return token_ids, []
        rows = torch.tensor(plan.report)
        return token_ids, self._logprobs_of(logits, rows, token_ids[rows], plan.report_counts)

    def _choose_in_torch(self, logits: Tensor, plan: "_Plan") -> tuple[Tensor, list[TokenLogprobs]]:
        """The same without the kernels."""
        logits = self._without_padding(logits)
        if not plan.report:
            plan.rules.apply(logits)
            return _tokens_in_torch(logits, plan, self._vocab_size), []
        rows = torch.tensor(plan.report, device=self._device)
        own = logits[rows]  # sampling overwrites them
        plan.rules.apply(logits)
        token_ids = _tokens_in_torch(logits, plan, self._vocab_size)
        return token_ids, self.logprobs(own, token_ids[rows], plan.report_counts)


def _tokens_in_torch(logits: Tensor, plan: "_Plan", vocab_size: int) -> Tensor:
    """Token ids (B,) from logits without padding, which are overwritten: each kind of rows in its
    own way."""
    token_ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    broken = ~logits.amax(-1).isfinite()
    if bool(broken.any()):
        logits[broken] = 0  # no distribution: let it pass without harm
    if plan.greedy:
        token_ids[plan.greedy] = argmax(_select(logits, plan.greedy))
    if plan.random:
        rows = plan.random
        shares = shares_of(_select(logits, rows), plan.scale[rows], vocab_size)
        if plan.is_filtered:
            shares = keep(shares, plan.top_k[rows], plan.top_p[rows], plan.min_p[rows])
        token_ids[rows] = draw(shares, plan.uniforms())
    return token_ids.masked_fill_(broken, NO_TOKEN)


class _Buffer:
    """Rows of float32 that are used again: memory that is new costs page faults at every step."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self._rows = torch.empty(0, width, device=device)

    def get(self, count: int) -> Tensor:
        """(count, width), of whatever the last user left."""
        if len(self._rows) < count:
            self._rows = torch.empty(count, self.width, device=self._rows.device)
        return self._rows[:count]


class _Plan:
    """What does not change while a batch consists of the same sequences."""

    def __init__(
        self, seqs: list[Sequence], eos_token_id: int | None, device: torch.device
    ) -> None:
        self.seqs, self._device = seqs, device
        self.rules = LogitRules(seqs, eos_token_id, device)
        self.report = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        self.report_counts = [seqs[row].params.logprobs or 0 for row in self.report]
        params = [seq.params for seq in seqs]
        self.greedy = [row for row, p in enumerate(params) if p.is_greedy]
        self.random = [row for row, p in enumerate(params) if not p.is_greedy]
        self.is_filtered = any(p.is_filtered for p in params)
        # All of these are (B,).
        scale = [scale_of(p) for p in params]
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.top_k = torch.tensor([p.top_k for p in params], dtype=torch.long, device=device)
        self.top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        self.min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)

    @cached_property
    def keys(self) -> Tensor:
        """Of each row's stream of random numbers: (B, 2), on the host. The kernels' alone."""
        keys = [stream_key(seq.params.seed, seq.prompt_i, seq.choice_j) for seq in self.seqs]
        return torch.from_numpy(np.array(keys, np.uint64).view(np.int64))

    def positions(self) -> list[int]:
        """Where in its stream each row is."""
        return [seq.output_len for seq in self.seqs]

    def uniforms(self) -> Tensor:
        """The next uniform of every random row (R,), float64."""
        seqs = [self.seqs[row] for row in self.random]
        row = np.array([stream_of(seq)[seq.output_len] for seq in seqs])
        return to_device(row, self._device)


def argmax(logits: Tensor) -> Tensor:
    """Ids (B,) of the greatest logits (B, n * WIDTH), the lowest of equal ones. In two steps, since
    a plain maximum is vectorised on a CPU and a search for its place is not."""
    blocks = logits.view(len(logits), -1, WIDTH)
    block = blocks.amax(-1).argmax(-1)  # (B,)
    rows = torch.arange(len(logits), device=logits.device)
    return block * WIDTH + blocks[rows, block].argmax(-1)


def scale_of(params: SamplingParams) -> float:
    """1 / temperature; 0 for greedy."""
    return 0.0 if params.is_greedy else 1 / max(params.temperature, MIN_TEMPERATURE)


def stream_of(seq: Sequence) -> np.ndarray:
    """A choice's uniforms (max_new,), drawn on first use."""
    if seq.uniforms is None:
        seq.uniforms = uniforms(seq.params.seed, seq.prompt_i, seq.choice_j, seq.max_new)
    return seq.uniforms


def _select(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows of (B, V), ascending: x itself if it is all of them, else a copy."""
    return x if len(rows) == len(x) else x[rows]
