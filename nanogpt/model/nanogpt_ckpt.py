"""nanoGPT's ckpt.pt, read in place, with the meta.pkl of a character model.

nanoGPT's MLP has had nn.GELU(), the exact one, since May 2023, also for a model that began as
OpenAI's (`init_from=gpt2`), though that was trained with the tanh approximation. A checkpoint does
not say which, so it gets the exact one, as nanoGPT's own sample.py would run it today.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from nanogpt.errors import CheckpointError
from nanogpt.model.assemble import Reader, assemble, given
from nanogpt.model.dtypes import WeightDtype
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.model.huggingface import GPT2_IDS
from nanogpt.model.pickles import read_plain_pickle, read_torch_file
from nanogpt.registry import TokenizerSpec

_MASK = re.compile(r"h\.\d+\.attn\.bias")  # of attention without flash; (1, 1, T, T)
_COMPILED = "_orig_mod."


class _ModelArgs(msgspec.Struct):
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool = True  # before the option existed


class _Meta(msgspec.Struct):
    """A character model's alphabet."""

    itos: dict[int, str]


def load(
    file: Path, dtype: WeightDtype, device: str | torch.device
) -> tuple[GPT, TokenizerSpec, Path]:
    """Model, tokenizer, and the file itself. Raises CheckpointError."""
    saved = read_torch_file(file)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise CheckpointError(f"{file} is not nanoGPT's: it has no 'model' and 'model_args'")
    try:
        args = msgspec.convert(saved["model_args"], _ModelArgs)
        config = GPTConfig(**msgspec.to_builtins(args), activation="gelu")
        state = msgspec.convert(saved["model"], dict[str, Any])
    except (msgspec.MsgspecError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    tokenizer = _tokenizer(file, config, saved.get("config"))
    return assemble(str(file), config, _readers(file, state), dtype, device), tokenizer, file


def _readers(file: Path, state: dict[str, Any]) -> dict[str, Reader]:
    tensors = {}
    for name, tensor in state.items():
        name = name.removeprefix(_COMPILED).removeprefix("transformer.")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {name} is not a tensor")
        if not (_MASK.fullmatch(name) and tensor.dim() == 4):
            tensors[name] = tensor
    return {name: given(tensor) for name, tensor in tensors.items()}


def _tokenizer(file: Path, config: GPTConfig, run: object) -> TokenizerSpec:
    """By meta.pkl: beside the checkpoint, or where nanoGPT keeps it, in data/ of the dataset."""
    places = [file.parent / "meta.pkl"]
    dataset = run.get("dataset") if isinstance(run, dict) else None
    if isinstance(dataset, str) and re.fullmatch(r"[\w-]+", dataset):
        places.append(file.absolute().parent.parent / "data" / dataset / "meta.pkl")
    meta = next((place for place in places if place.is_file()), None)
    if meta is not None:
        characters = read_meta(meta)
        if len(characters) != config.vocab_size:
            raise CheckpointError(
                f"{meta} has {len(characters)} characters, but {file} has {config.vocab_size} rows"
            )
        return TokenizerSpec(kind="char", characters=characters)
    if config.vocab_size in GPT2_IDS:
        return TokenizerSpec(kind="gpt2")
    raise CheckpointError(
        f"{file} has a vocabulary of {config.vocab_size}, which is not GPT-2's: put the dataset's "
        "meta.pkl beside it"
    )


def read_meta(path: Path) -> str:
    """The characters of nanoGPT's meta.pkl in the order of their ids. Raises CheckpointError."""
    try:
        itos = msgspec.convert(read_plain_pickle(path), _Meta).itos
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is not nanoGPT's table of characters: {error}") from error
    characters = [itos.get(i, "") for i in range(len(itos))]
    if any(len(c) != 1 for c in characters) or len(set(characters)) != len(characters):
        raise CheckpointError(f"{path}: itos must have one character for each id from 0 on")
    return "".join(characters)
