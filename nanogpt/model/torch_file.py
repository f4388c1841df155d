"""Files that torch.save wrote: mapped into memory, and nothing in them is ever executed."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanogpt.errors import CheckpointError


def read_torch_file(path: Path) -> Any:
    """Tensors and plain values of the file. Raises CheckpointError."""
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is not of torch.save's zip format, or it is cut off: save it again"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"can't read {path}: {str(error).splitlines()[0]}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, so it is not loaded: "
            f"save the state dict alone"
        ) from error
