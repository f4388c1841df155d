"""The state of a training run on disk: enough to go on after kill -9 as if nothing had happened.

One safetensors file holds the parameters, the optimisers' tensors and the average; its metadata
holds the rest. No random state is kept, since every random number of training is a function of
(seed, step).
"""

import os
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanogpt.errors import CheckpointError
from nanogpt.train.average import Average
from nanogpt.train.config import TrainConfig

FILE = "state.safetensors"


class Progress(msgspec.Struct, kw_only=True):
    """Where a run is."""

    step: int = 0
    elapsed_s: float = 0.0  # of training, over all resumptions
    best_val: float | None = None  # lowest validation loss so far
    loss_scale: float = 65536.0  # of float16 training


class _Header(msgspec.Struct, frozen=True):
    progress: Progress
    config: TrainConfig


def _tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None
) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    tensors = {f"model.{name}": param.detach() for param, name in names.items()}
    for i, optimizer in enumerate(optimizers):
        for param, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{i}.{names[param]}.{key}"] = value.detach().contiguous()
    if average:
        tensors |= {f"average.{name}": mean for name, mean in average.means.items()}
    return tensors


def save(
    out: Path,
    config: TrainConfig,
    progress: Progress,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Average | None = None,
) -> None:
    """Replace the state in `out` atomically; it is on the disk when this returns."""
    header = msgspec.json.encode(_Header(progress, config)).decode()
    temporary = out / (FILE + ".new")
    save_file(_tensors(model, optimizers, average), temporary, metadata={"run": header})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, out / FILE)


def peek(out: Path) -> tuple[Progress, TrainConfig] | None:
    """Progress and recipe of the run in `out`, or nothing. Raises CheckpointError."""
    if not (out / FILE).exists():
        return None
    try:
        with safe_open(out / FILE, framework="pt") as file:
            header = msgspec.json.decode((file.metadata() or {})["run"], type=_Header)
    except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"can't read {out / FILE} ({error}): remove it to train anew"
        ) from error
    return header.progress, header.config


def restore(
    out: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Average | None = None,
) -> None:
    """Fill the model, the optimisers and the average with the state in `out`."""
    params = dict(model.named_parameters())
    with safe_open(out / FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            kind, _, rest = key.partition(".")
            value = file.get_tensor(key)
            if kind == "model":
                params[rest].data.copy_(value)
                continue
            if average and kind == "average":
                average.means[rest].copy_(value)
                continue
            index, _, rest = rest.partition(".")
            name, _, slot = rest.rpartition(".")
            param = params[name]
            optimizers[int(index)].state[param][slot] = value.to(param.device, copy=True)
