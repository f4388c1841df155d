"""Between the host's memory and a device's, without waiting for the device."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array: its own memory on a CPU, else a copy that nobody waits for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copy_in(array: np.ndarray, target: Tensor) -> None:
    """Fill a tensor with the array, when the device gets there; the array may change at once."""
    source = torch.from_numpy(array)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


class Fetched:
    """A tensor's numbers as they are when the device gets there, on their way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._numbers = tensor.clone()
            return
        self._numbers = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._numbers.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)  # a waiting host doesn't spin
        self._event.record()

    def wait(self) -> np.ndarray:
        """The numbers, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.numpy()
