"""Where a run happens, and the model it begins with."""

import os
from contextlib import AbstractContextManager, nullcontext

import msgspec
import torch
import torch.distributed as dist

from nanogpt import registry
from nanogpt.data.dataset import Meta
from nanogpt.errors import ConfigError
from nanogpt.model.dtypes import DTYPES, fastest_dtype
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.model.grow import grow
from nanogpt.model.load import load_model
from nanogpt.train.config import Shape, TrainConfig


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Device, precision and rank of this process."""

    device: torch.device
    dtype: torch.dtype  # of the products; parameters are float32
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def find_place(config: TrainConfig) -> Place:
    """This process's place, from the configuration and torchrun's variables; joins the group."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but PyTorch finds no GPU: use 'auto' or 'cpu'")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Place(
        device=device, dtype=_dtype(config.dtype, device), rank=rank, world_size=world_size
    )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return fastest_dtype(device)
    if name == "float16" and device.type == "cpu":
        raise ConfigError("float16 training needs a GPU: use 'auto', 'float32' or 'bfloat16'")
    return DTYPES[name]


def build_model(config: TrainConfig, meta: Meta, place: Place) -> GPT:
    """A fresh model, or the one that the recipe starts from, float32 on the device."""
    torch.manual_seed(config.seed)
    if config.init_from != "scratch":
        return _start_from(config, meta, place)
    shape = msgspec.to_builtins(config.model or Shape())
    # GPT-2's 50257 rows are padded to a multiple of 64, for faster products.
    rows = meta.vocab_size if meta.tokenizer.kind == "char" else -(-meta.vocab_size // 64) * 64
    model = GPT(GPTConfig(vocab_size=rows, **shape), config.dropout)
    model.init_weights()
    return model.to(place.device)


def _start_from(config: TrainConfig, meta: Meta, place: Place) -> GPT:
    name, source = registry.any_source(config.init_from)
    loaded = load_model(source, name, dtype=torch.float32, device=place.device)
    if not meta.fits(loaded.info):
        mend = f"bpe --tokenizer-of {config.init_from}"
        if loaded.info.tokenizer.kind == "char":
            mend = "char, from a text with the same characters"
        raise ConfigError(
            f"{config.data} and {config.init_from} have different tokens: prepare the data as "
            f"{mend}"
        )
    shape = loaded.model.config
    if config.model:
        shape = msgspec.structs.replace(shape, **msgspec.structs.asdict(config.model))
    return grow(loaded.model, shape, config.dropout)
