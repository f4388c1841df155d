"""The only reader and writer of pickles: torch.save's files and nanoGPT's meta.pkl.

Nothing that is read is run.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanogpt.errors import CheckpointError

MAX_PLAIN_BYTES = 16 << 20  # a table of all of Unicode's characters is smaller


def read_torch_file(path: Path) -> Any:
    """Tensors, mapped into memory, and plain values. Raises CheckpointError."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not of torch.save's zip format, or it is cut off: save or copy it again"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, so it is not loaded: "
            "save the state dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"can't read {path}: {str(error).splitlines()[0]}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Dictionaries, lists, strings and numbers; whatever names a class or a function fails."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to another file")


def write_plain_pickle(path: Path, value: Any) -> None:
    """Dictionaries, lists, strings and numbers."""
    path.write_bytes(pickle.dumps(value))


def read_plain_pickle(path: Path) -> Any:
    """Raises CheckpointError when there is anything but plain values in it."""
    try:
        content = path.read_bytes()
        if len(content) > MAX_PLAIN_BYTES:
            raise pickle.UnpicklingError(f"it has more than {MAX_PLAIN_BYTES} bytes")
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"can't read {path}: {error}") from error
