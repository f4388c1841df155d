"""The compiled kernels: which file belongs to this source and this machine, and loading it."""

import hashlib
import platform
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCES = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), FOLDER / "build.py"])


def _cpu_features() -> str:
    """The instruction sets of this machine, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s for s in lines if s.startswith(("flags", "Features"))), platform.machine())


def library_path() -> Path:
    """Where the library for this source, this torch and this machine is, or would be."""
    digest = hashlib.sha256(f"{torch.__version__} {_cpu_features()}".encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    return FOLDER / "_build" / f"kernels_{digest.hexdigest()[:16]}.so"


def load_kernels() -> bool:
    """Make torch.ops.nanogpt_cpu available, if the kernels have been built. Never compiles. What is
    loaded stays, though the source changes under a running process."""
    if hasattr(torch.ops.nanogpt_cpu, "sample"):
        return True
    path = library_path()
    if path.exists():
        torch.ops.load_library(path)
    return path.exists()
