"""Hugging Face's GPT-2 directories, read in place: config.json, and weights of either format.

Their linear layers are Conv1D, whose weights are (in, out): ours are the transpose. GELU is the
tanh approximation ("gelu_new") in all of OpenAI's models.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt.bpe_files import has_bpe_files
from nanogpt.errors import CheckpointError
from nanogpt.model.assemble import Reader, assemble, given
from nanogpt.model.dtypes import WeightDtype
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.model.pickles import read_torch_file
from nanogpt.registry import TokenizerSpec
from nanogpt.weight_files import WEIGHTS, read_index, weights_file

GPT2_IDS = range(50257, 50305)  # rows of an embedding for GPT-2's vocabulary, padding included

_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
# Options that change the network, and the only values that this one has.
_ONLY: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "layer_norm_epsilon": 1e-5,
    "quantization_config": None,
}
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers, not weights
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


class _Config(msgspec.Struct):
    """What we need of config.json."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    n_positions: int = 1024
    n_inner: int | None = None
    activation_function: str = "gelu_new"


def load(
    directory: Path, dtype: WeightDtype, device: str | torch.device, *, views: bool = False
) -> tuple[GPT, TokenizerSpec, Path]:
    """Model, tokenizer, and the file that holds the weights; `views` as in `assemble`. Raises
    CheckpointError."""
    config = read_config(directory / "config.json")
    file = weights_file(directory)
    if file is None:
        raise CheckpointError(f"{directory} has no weights: one of {', '.join(WEIGHTS)}")
    tokenizer = _tokenizer(directory, config)
    readers = _our_names(file, _open(file))
    return assemble(str(file), config, readers, dtype, device, views=views), tokenizer, file


def read_config(path: Path) -> GPTConfig:
    """Raises CheckpointError that names an option which is not supported."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if raw.get("model_type") != "gpt2":
            raise CheckpointError(
                f"{path} is of model_type {raw.get('model_type')!r}: only gpt2 is supported"
            )
        config = msgspec.convert(raw, _Config)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for option, value in _ONLY.items():
        if raw.get(option, value) != value:
            raise CheckpointError(f"{path}: {option} = {raw[option]!r} is not supported")
    if config.n_inner not in (None, 4 * config.n_embd):
        raise CheckpointError(f"{path}: n_inner = {config.n_inner} is not supported, only 4 n_embd")
    if config.activation_function not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation_function = {config.activation_function!r} is not supported, "
            f"only {', '.join(_ACTIVATIONS)}"
        )
    try:
        return GPTConfig(
            block_size=config.n_positions,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            activation=_ACTIVATIONS[config.activation_function],
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _tokenizer(directory: Path, config: GPTConfig) -> TokenizerSpec:
    if has_bpe_files(directory):
        return TokenizerSpec(kind="gpt2", directory=str(directory))
    if config.vocab_size not in GPT2_IDS:
        raise CheckpointError(
            f"{directory} has neither vocab.json and merges.txt nor tokenizer.json, and a "
            f"vocabulary of {config.vocab_size} is not GPT-2's"
        )
    return TokenizerSpec(kind="gpt2")


def _open(file: Path) -> dict[str, Reader]:
    """Readers by the names in the file; nothing is read before they are called."""
    if not file.name.endswith(".index.json"):
        return _open_part(file)
    parts = read_index(file)
    readers: dict[str, Reader] = {}
    for part in sorted(set(parts.values())):
        readers |= _open_part(part)
    if missing := sorted(parts.keys() - readers.keys()):
        raise CheckpointError(f"{parts[missing[0]]} lacks {missing[0]}, which {file.name} lists")
    return readers


def _open_part(file: Path) -> dict[str, Reader]:
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    state = read_torch_file(file)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} is not a state dict: names and tensors")
    return {name: given(tensor) for name, tensor in state.items()}


def _open_safetensors(file: Path) -> dict[str, Reader]:
    try:
        opened = safe_open(file, framework="pt")
        names = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read {file} ({error}): copy or download it again") from error
    return {name: partial(opened.get_tensor, name) for name in names}


def _transposed(read: Reader) -> Reader:
    return lambda: read().t()


def _our_names(file: Path, readers: dict[str, Reader]) -> dict[str, Reader]:
    """By our names and the right way round, without masks."""
    ours: dict[str, Reader] = {}
    for name, read in readers.items():
        name = name.removeprefix("transformer.")
        if _MASK.fullmatch(name):
            continue
        if name in ours:
            raise CheckpointError(f"{file} has {name} twice, with and without 'transformer.'")
        ours[name] = _transposed(read) if CONV1D.fullmatch(name) else read
    return ours
