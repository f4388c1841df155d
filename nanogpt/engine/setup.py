"""From configuration to an engine: device, dtype, memory, weights."""

import os

import torch

from nanogpt import process, registry
from nanogpt.config import ServeConfig
from nanogpt.engine.cpu import onednn
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import best_dtype, bit_sums, multiplies_natively
from nanogpt.engine.engine import Engine
from nanogpt.engine.sizes import size_of
from nanogpt.errors import StartupError
from nanogpt.model.dtypes import DTYPES, WeightDtype, fastest_dtype
from nanogpt.model.load import LoadedModel, load_model
from nanogpt.ranks import Ranks
from nanogpt.servable import MODELS_SHARE

GIB = 2**30
CPU_SHARE = 0.4  # of the memory that is free after loading, for KV
CPU_MOST = 2 * GIB  # planned for a rank on a CPU: more would not make it faster


def choose_device(config: ServeConfig, ranks: Ranks) -> torch.device:
    """This rank's device. Raises StartupError when CUDA is asked for and not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise StartupError("device is cuda, but torch finds no usable GPU; use --device cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks.local_world_size))
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise StartupError(
            f"local rank {ranks.local_rank} has no GPU of its own: "
            f"{torch.cuda.device_count()} are visible; use fewer --ranks"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def arithmetic(device: torch.device) -> str:
    """What this rank computes with: another has other last bits, and so other text. GPUs of
    different kinds are taken for one, since they agree no less than one with itself in other
    batches."""
    if device.type == "cuda":
        return "a GPU"
    units = " and bfloat16 units" if multiplies_natively(torch.bfloat16) else ""
    if load_kernels():
        return f"our C++ kernels{units}"
    return f"oneDNN{units}" if onednn.has_products(torch.float32) else "plain torch"


def choose_dtype(config: ServeConfig, device: torch.device) -> WeightDtype:
    """What weights are loaded in; "auto" is what the device is fastest with; or StartupError."""
    if config.dtype in DTYPES:
        return DTYPES[config.dtype]
    if config.dtype == "int8" and not (device.type == "cpu" and load_kernels()):
        raise StartupError(
            "dtype int8 is for CPUs, with the kernels that dev/setup.sh builds (python -m "
            "nanogpt.engine.cpu.build says why there are none); use another dtype"
        )
    return fastest_dtype(device) if device.type == "cuda" else best_dtype


def load(config: ServeConfig, name: str, source: str, device: torch.device) -> LoadedModel:
    """A model as it is configured. Raises StartupError, CheckpointError."""
    dtype = choose_dtype(config, device)
    int8, unknown = config.dtype == "int8", registry.unknown_character(name, registry.read_cards())
    packing = bit_sums if device.type == "cpu" and load_kernels() else None
    return load_model(
        source, name, dtype=dtype, device=device, int8=int8, unknown=unknown, packing=packing
    )


def models_budget(config: ServeConfig, ranks: Ranks, device: torch.device) -> int:
    """Bytes on each rank for weights and KV of all models that are in memory; 0: no limit. Ask
    before anything is loaded."""
    wanted = config.residency.memory_gib
    if wanted != "auto":
        return int(wanted * GIB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * MODELS_SHARE)
    return int(process.available_memory() * MODELS_SHARE / ranks.local_world_size)


def kv_budget(
    config: ServeConfig, ranks: Ranks, device: torch.device, loaded: list[LoadedModel]
) -> int:
    """Bytes of KV for all models of this rank, given what is free once they are loaded."""
    engine = config.engine
    if engine.kv_memory_gib:
        return int(engine.kv_memory_gib * GIB)
    if device.type == "cuda":
        from nanogpt.engine.cuda import memory

        limits = memory.Limits(
            engine.max_num_seqs, engine.max_batch_tokens, engine.block_size, engine.deterministic
        )
        return memory.kv_budget(loaded, limits, device)
    free = process.available_memory()
    return min(CPU_MOST, int(free * CPU_SHARE / ranks.local_world_size))


def plan_blocks(
    budget: int, bytes_per_context: list[int], blocks_per_context: list[int], most_contexts: int
) -> list[int]:
    """Blocks of KV for each model: the same number of full contexts for all, out of `budget`
    bytes, and no more than can be in use. Raises StartupError when one context doesn't fit."""
    contexts = min(budget / sum(bytes_per_context), most_contexts)
    if contexts < 1:
        raise StartupError(
            f"too little memory: {budget / GIB:.2f} GiB are free for keys and values, one full "
            f"context of every model takes {sum(bytes_per_context) / GIB:.2f} GiB; serve fewer "
            "models, use a smaller dtype, or set engine.kv_memory_gib if there is more"
        )
    return [int(contexts * blocks) for blocks in blocks_per_context]


def plan_loaded(
    config: ServeConfig, ranks: Ranks, device: torch.device, loaded: list[LoadedModel]
) -> dict[str, int]:
    """Blocks of KV for models that share what is free now."""
    sizes = [size_of(config, device, m.info, m.model.config) for m in loaded]
    num_blocks = plan_blocks(
        kv_budget(config, ranks, device, loaded),
        [size.context for size in sizes],
        [size.blocks_per_context for size in sizes],
        config.engine.max_num_seqs,
    )
    return {m.info.name: blocks for m, blocks in zip(loaded, num_blocks, strict=True)}


def build_engine(
    loaded: LoadedModel,
    num_kv_blocks: int,
    config: ServeConfig,
    ranks: Ranks,
    device: torch.device,
) -> Engine:
    """The model's engine, as it is configured."""
    return Engine(
        loaded,
        rank=ranks.rank,
        device=device,
        num_kv_blocks=num_kv_blocks,
        block_size=config.engine.block_size,
        max_num_seqs=config.engine.max_num_seqs,
        max_batch_tokens=config.engine.max_batch_tokens,
        # On a CPU Python is not what a step waits for.
        burst_steps=config.engine.burst_steps if device.type == "cuda" else 0,
        deterministic=config.engine.deterministic,
    )
