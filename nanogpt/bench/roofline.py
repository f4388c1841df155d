"""The least time that a step can take on this machine, from what is measured on the spot.

A step reads every weight and the keys and values of its contexts from memory once, and multiplies
(Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009): it can't take less than the longer
of the two, each at the best rate that a plain loop reaches here.
"""

import time
from collections.abc import Callable

import msgspec
import torch

from nanogpt.model.gpt import GPTConfig

READ_BYTES = {"cpu": 2**29, "cuda": 2**32}  # far beyond any cache
MM_SIZE = {"cpu": 2048, "cuda": 8192}
REPEATS = 7


class Roof(msgspec.Struct, frozen=True):
    """What the device does at its best."""

    bytes_per_s: float
    flops_per_s: float
    products: str  # the type that was multiplied


class Shape(msgspec.Struct, frozen=True):
    """What counts of a network: for a decode step of B sequences with T tokens of context each."""

    weight_bytes: int  # the matrices that every step reads; not the position embeddings
    kv_bytes: int  # of one token
    weights: int  # each is one multiply-add a token
    attention_width: int  # channels times layers: 2 multiply-adds a channel and token of context

    @classmethod
    def of(
        cls, config: GPTConfig, num_parameters: int, item_bytes: int, kv_item_bytes: int
    ) -> "Shape":
        weights = num_parameters - config.block_size * config.n_embd
        width = config.n_layer * config.n_embd
        return cls(weights * item_bytes, 2 * width * kv_item_bytes, weights, width)

    def decode_s(self, roof: Roof, batch: int, context: int) -> float:
        """Least seconds of one step that gives each of `batch` sequences a token."""
        read = self.weight_bytes + batch * context * self.kv_bytes
        flops = batch * (2 * self.weights + 4 * context * self.attention_width)
        return max(read / roof.bytes_per_s, flops / roof.flops_per_s)

    def prefill_s(self, roof: Roof, length: int) -> float:
        """Least seconds for a prompt; its logits are needed at the last position only, which is
        left out of the count of operations."""
        flops = length * (2 * self.weights + 2 * length * self.attention_width)
        return max(self.weight_bytes / roof.bytes_per_s, flops / roof.flops_per_s)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(device: torch.device, products: torch.dtype) -> Roof:
    """Read a large buffer, multiply square matrices of that type; the best of several times."""
    name = str(products).removeprefix("torch.")
    return Roof(_read_bytes_per_s(device), _flops_per_s(device, products), name)


def _read_bytes_per_s(device: torch.device) -> float:
    x = torch.ones(READ_BYTES[device.type] // 4, device=device)
    return x.nbytes / _best_s(device, lambda: x.sum())


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    size = MM_SIZE[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_s(device, lambda: torch.mm(a, b, out=out))


def _best_s(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
