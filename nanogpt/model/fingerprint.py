"""What tells one model's weights from another's."""

import hashlib
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from nanogpt.model.gpt import GPT

# A tensor's sums, as `bit_sums` gives them.
BitSums = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def fingerprint(model: GPT, key: bytes = b"", sums_of: BitSums | None = None) -> str:
    """16 hexadecimal digits of configuration, dtype and every weight: a change of one shows.

    `key` stands for whatever else makes this another model. `sums_of` may be a faster `bit_sums`.

    Not of the file, so that one model in several formats has one fingerprint. Each tensor counts
    by the sums of its rows and of its columns, of bit patterns modulo 2**64: that runs at the
    speed of memory, and only a change of four weights or more, made on purpose, can slip through.
    """
    digest = hashlib.blake2b(msgspec.json.encode(model.config), digest_size=8, key=key)
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for sums in (sums_of or bit_sums)(tensor):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def bit_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of rows, and of columns, of the bits as whole numbers; (R, C) to (R,) and (C,)."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
    if rows.shape[-1] * rows.element_size() % 8 == 0:
        bits = rows.view(torch.int64)  # fewer, wider numbers: faster
    else:
        bits = rows.view(torch.uint8)
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)
