"""Which attention a GPU gets."""

import importlib.util
import logging

import torch

from nanogpt.engine.attention import AttentionBackend, TorchBackend
from nanogpt.errors import StartupError

log = logging.getLogger(__name__)

PROGRAMS_PER_PROCESSOR = 2  # with fewer programs than that, the GPU would idle


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    *,
    deterministic: bool,
) -> AttentionBackend:
    """FlashAttention where it can read these blocks, else Triton's kernels, else plain torch.

    Raises StartupError when determinism is asked for and Triton is not installed.
    """
    if not deterministic:
        from nanogpt.engine.cuda import varlen

        if varlen.fits(device, dtype, block_size, head_size):
            return varlen.VarlenBackend()
    if importlib.util.find_spec("triton"):
        from nanogpt.engine.cuda.triton_backend import TritonBackend

        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return TritonBackend(
            fixed_tiles=deterministic,
            enough_programs=PROGRAMS_PER_PROCESSOR * processors,
            tensor_cores=torch.cuda.get_device_capability(device) >= (8, 0),
        )
    if deterministic:
        raise StartupError("engine.deterministic needs Triton on a GPU: pip install triton")
    log.warning("Triton is not installed: attention gathers keys and values, which is slow")
    return TorchBackend()
