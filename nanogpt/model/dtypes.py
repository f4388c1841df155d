"""Types of weights and products: by name, and the best one for a device."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fastest_dtype(device: torch.device) -> torch.dtype:
    """What the device has in hardware: bfloat16 before float16, and float32 on other CPUs, where
    half precision is emulated."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
