"""How much of a GPU's memory is left for keys and values: by trying what a full step takes."""

import gc
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch

from nanogpt.engine.decode import IDLE
from nanogpt.engine.kv_cache import blocks_per_context
from nanogpt.engine.model_runner import ModelRunner
from nanogpt.engine.scheduler import Batch, Chunk
from nanogpt.engine.sequence import Sequence
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest
from nanogpt.sampling_params import SamplingParams

MIB = 2**20
# What torch does not count: compiled kernels, cuBLAS's workspaces, the graphs themselves; and
# fragments, of what is free.
UNCOUNTED, SHARE = 512 * MIB, 0.95


class Limits(NamedTuple):
    """What the largest step of an engine is."""

    max_num_seqs: int
    max_batch_tokens: int
    block_size: int
    deterministic: bool


class Needs(NamedTuple):
    """Bytes that one model takes beside its weights and its KV cache."""

    step: int  # the largest step, until it is over
    kept: int  # buffers that stay
    graphs: int  # what recorded decode steps keep to themselves


def kv_budget(models: Seq[LoadedModel], limits: Limits, device: torch.device) -> int:
    """Bytes for the KV of all models, once they are loaded. One model's step runs at a time."""
    needs = [measure(loaded, limits, device) for loaded in models]
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return budget(free, needs)


def budget(free: int, needs: Seq[Needs]) -> int:
    """What is left of so many free bytes; 0 at least."""
    fixed = sum(each.kept + each.graphs for each in needs)
    left = int(free * SHARE) - UNCOUNTED - fixed - max(each.step for each in needs)
    return max(0, left)


@torch.inference_mode()
def measure(loaded: LoadedModel, limits: Limits, device: torch.device) -> Needs:
    """Run the largest steps of a model over a cache of one context."""
    num_blocks = blocks_per_context(loaded.info.context_length, limits.block_size)
    runner = ModelRunner(
        loaded,
        device=device,
        num_kv_blocks=num_blocks,
        block_size=limits.block_size,
        deterministic=limits.deterministic,
    )
    start = _restart(device)
    runner.run(largest_batch(loaded, limits, num_blocks))
    step = torch.cuda.max_memory_allocated(device) - start
    kept = torch.cuda.memory_allocated(device) - start
    start = _restart(device)
    rows = limits.max_num_seqs
    decoder = runner.decoder(max_rows=rows, max_steps=1, recorded=False)
    if decoder:
        tables = np.zeros((rows, num_blocks), np.int32)
        decoder.run(tables, np.full(rows, IDLE), np.zeros((1, rows))).wait()
    return Needs(step - kept, kept, torch.cuda.max_memory_allocated(device) - start)


def _restart(device: torch.device) -> int:
    """Forget the peak; bytes in use now."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def largest_batch(loaded: LoadedModel, limits: Limits, num_blocks: int) -> Batch:
    """As many tokens as a step may have, and as many choices that sample, in the dearest way.

    All of them share the blocks of one context: what is computed is of no interest.
    """
    context = loaded.info.context_length
    request = GenerateRequest(
        request_id="measure",
        model=loaded.info.name,
        prompts=((loaded.info.start_token_id,) * (context - 1),),
        n=limits.max_num_seqs,
        params=SamplingParams(
            seed=0, max_tokens=1, top_p=0.9, top_k=50, logprobs=1, repetition_penalty=1.1
        ),
    )
    seqs = [
        Sequence(request, index, arrival=index, context_length=context)
        for index in range(limits.max_num_seqs)
    ]
    batch, left = Batch(), limits.max_batch_tokens
    while left:
        end = min(context - 1, left)
        batch.chunks.append(Chunk(seqs[0], 0, end))
        left -= end
    seqs[0].block_table = [*range(num_blocks)]
    batch.chunks[0].samplers = seqs
    return batch
