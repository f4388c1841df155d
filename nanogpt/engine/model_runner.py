"""Runs a batch: the network over its packed rows, then the sampler over the rows that need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.engine.attention import AttentionMetadata, PagedAttend, allocate_kv_cache
from nanogpt.engine.cpu.linear import pack_model
from nanogpt.engine.decode import Decoder, DecodeState, DecodeStep, power_buckets
from nanogpt.engine.kv_cache import blocks_per_context
from nanogpt.engine.packing import pack
from nanogpt.engine.running_batch import RunningBatch
from nanogpt.engine.sampler import Sampler
from nanogpt.engine.scheduler import Batch, Chunk
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.transfer import to_device
from nanogpt.request import TokenLogprobs

SCORED_ROWS = 64  # rows of logits at a time when a prompt is scored: 13 MB for GPT-2

if TYPE_CHECKING:
    from nanogpt.model.load import LoadedModel


@dataclass(slots=True)
class StepOutput:
    """What a step brought forth, all of it in the order of the batch.

    `token_ids` and `logprobs` are parallel to the chunks' samplers. `scores` are those of each
    scored prompt from its sequence's `score_next` on.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    scores: list[tuple[Sequence, tuple[TokenLogprobs, ...]]]


class ModelRunner:
    """Owns the network, the KV cache and the sampler of one engine.

    The network's linear layers are made ready for the device, in place. `deterministic` matters on
    GPUs: then what else is computed does not change a bit of a row's result, as always on CPUs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: torch.device,
        num_kv_blocks: int,
        block_size: int,
        deterministic: bool = False,
    ) -> None:
        self._model, self._device, self._info = loaded.model, device, loaded.info
        config, dtype = loaded.model.config, loaded.model.wte.weight.dtype
        self._head = self._prepare(deterministic)
        # One block more, for rows that go on idly (see decode.py).
        self._cache = allocate_kv_cache(
            config, num_kv_blocks + 1, block_size, dtype, device, deterministic=deterministic
        )
        self._sampler = Sampler(
            vocab_size=loaded.info.vocab_size,
            eos_token_id=loaded.info.eos_token_id,
            device=device,
        )
        self._running: RunningBatch | None = None  # the last step, if it was all decode

    def _prepare(self, deterministic: bool) -> nn.Module:
        """The network made ready; what turns hidden states (N, C) into logits (N, V)."""
        if self._device.type == "cpu":
            pack_model(self._model, int8=self._info.dtype == "int8")
            return self._model.lm_head
        from nanogpt.engine.cuda import linear

        if deterministic:
            linear.make_deterministic(self._model)
        return linear.Head(self._model.lm_head.weight, tiled=deterministic)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """Compute a batch. Whatever goes wrong here is the engine's end, not one request's."""
        self.copy_blocks(batch.copies)
        hidden = self._hidden(*self._inputs(batch))  # (N, C)
        if self._running:  # each row gives one token
            token_ids, logprobs = self._sampler.sample(self._head(hidden), self._running.seqs)
            return StepOutput(token_ids, logprobs, [])
        scores, rows, sampled, row = [], [], [], 0
        for chunk in batch.chunks:
            if chunk.seq.scoring:
                scores.append((chunk.seq, self._score(hidden, chunk, row)))
            row += chunk.end - chunk.start
            rows += [row - 1] * len(chunk.samplers)
            sampled += chunk.samplers
        if not sampled:
            return StepOutput([], [], scores)
        logits = self._head(hidden[self._tensor(rows)])  # (B, V)
        token_ids, logprobs = self._sampler.sample(logits, sampled)
        return StepOutput(token_ids, logprobs, scores)

    def close(self) -> None:
        """Drop network and cache. They are in cycles, which the garbage collector may never look at
        (see gc.freeze in setup.py), so each of them is taken apart."""
        for module in list(self._model.modules()):
            module.__dict__.clear()
        self.__dict__.clear()

    @torch.inference_mode()
    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks of the cache, source to destination, one after another."""
        for source, target in copies:
            self._cache.copy_block(source, target)

    @torch.inference_mode()
    def decoder(self, *, max_rows: int, max_steps: int, recorded: bool = True) -> Decoder | None:
        """Decode steps of up to `max_rows` sequences, `max_steps` of them between two looks; as
        graphs on a GPU, unless they are not to be `recorded`. None for plain torch attention, which
        would gather whole contexts, since only the host knows how long they are."""
        if self._cache.backend.name == "torch":
            return None
        size = self._cache.block_size
        max_blocks = blocks_per_context(self._info.context_length, size)
        state = DecodeState(
            max_rows=max_rows, max_steps=max_steps, max_blocks=max_blocks, device=self._device
        )
        step: Callable[[int], None] = DecodeStep(
            self._logits,
            state,
            block_size=size,
            spare_block=self._cache.num_blocks - 1,
            vocab_size=self._info.vocab_size,
        )
        buckets = power_buckets(max_rows)
        if recorded and self._device.type == "cuda":
            from nanogpt.engine.cuda.graphs import GraphedStep

            step = GraphedStep(step, buckets)
        return Decoder(step, state, buckets)

    def _logits(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self._head(self._hidden(token_ids, metadata))

    def _hidden(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        attend = PagedAttend(self._cache, metadata)
        return self._model.hidden(token_ids, metadata.positions, attend)

    def _inputs(self, batch: Batch) -> tuple[Tensor, AttentionMetadata]:
        """Token ids (N,) and where they belong. Sets `_running` for a batch of decodes only."""
        if not (batch.follows and self._running and self._running.advance()):
            self._running = None
            if not batch.is_decode or any(chunk.seq.scoring for chunk in batch.chunks):
                return pack(batch.chunks, self._cache.block_size, self._device)
            self._running = RunningBatch(batch.chunks, self._cache.block_size)
        return self._running.to(self._device)

    def _score(self, hidden: Tensor, chunk: Chunk, first_row: int) -> tuple[TokenLogprobs, ...]:
        """Log probabilities of the chunk's prompt tokens, each from the row before it, in slices:
        memory does not grow with the prompt."""
        seq = chunk.seq
        last = min(chunk.end, seq.prompt_len - 1)
        entries: list[TokenLogprobs] = []
        for position in range(seq.score_next, last + 1, SCORED_ROWS):
            tokens = seq.tokens[position : min(position + SCORED_ROWS, last + 1)]
            row = first_row + position - 1 - chunk.start
            logits = self._head(hidden[row : row + len(tokens)])
            top = seq.params.logprobs or 0
            entries += self._sampler.logprobs(logits, self._tensor(tokens), [top] * len(tokens))
        return tuple(entries)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return to_device(np.array(numbers, np.int64), self._device)
