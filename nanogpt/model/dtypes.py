"""Types of weights and products: by name, and the best one for a device."""

import functools
from collections.abc import Callable, Iterable

import torch

# The type that weights are loaded in: this one, or what the function makes of the file's own.
WeightDtype = torch.dtype | Callable[[torch.dtype], torch.dtype]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(wanted: WeightDtype, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The type for weights that a file has as `stored`: for the one that holds all of them."""
    if isinstance(wanted, torch.dtype):
        return wanted
    return wanted(functools.reduce(torch.promote_types, stored))


def as_stored(stored: torch.dtype) -> torch.dtype:
    """The file's own: a WeightDtype for whoever wants to lose nothing."""
    return stored


def fastest_dtype(device: torch.device) -> torch.dtype:
    """What the device has in hardware: bfloat16 before float16, and float32 on other CPUs, where
    half precision is emulated."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
