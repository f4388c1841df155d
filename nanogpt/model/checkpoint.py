"""Checkpoints: a directory of model.safetensors, config.json, the tokenizer's files and a card.

model.safetensors   the state dict without lm_head, which is tied to wte
config.json         {"format": "nanogpt", "version": 1, "model": ..., "tokenizer": ...}
characters.json     of a character model: the characters in the order of their ids
vocab.json, merges.txt   of a byte-pair model, when it brings its own
README.md           the model card
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanogpt.errors import CheckpointError
from nanogpt.model.assemble import TIED, fill, outline
from nanogpt.model.dtypes import WeightDtype, resolve
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.registry import TokenizerSpec

WEIGHTS, CONFIG, CHARACTERS, CARD = (
    "model.safetensors",
    "config.json",
    "characters.json",
    "README.md",
)
VERSION = 1

T = TypeVar("T")


class _Tokenizer(msgspec.Struct, frozen=True):
    kind: Literal["char", "gpt2"]


class _Config(msgspec.Struct, frozen=True):
    """config.json; other keys than these are for people."""

    format: Literal["nanogpt"]
    version: int
    model: GPTConfig
    tokenizer: _Tokenizer


def save(
    directory: str | Path,
    model: GPT,
    tokenizer: TokenizerSpec,
    *,
    dtype: torch.dtype = torch.float16,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint; `files` are further ones by name, such as the card.

    The directory is written under a temporary name beside its place and then renamed, so a reader
    never sees half a checkpoint, whenever this process is killed. An existing one is replaced.
    """
    target = Path(directory)
    with _beside(target) as temporary:
        _write(temporary, model, tokenizer, dtype, files or {})
        _move(temporary, target)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to be filled, which gets its name only when it is complete. Raises
    CheckpointError when there is one of that name."""
    check_new(target)
    with _beside(target) as temporary:
        yield temporary
        os.rename(temporary, target)


def check_new(target: Path) -> None:
    """Raises CheckpointError when there is one of that name."""
    if target.exists():
        raise CheckpointError(f"{target} is there already: choose another name, or remove it")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary directory on the same disk, to be renamed; else it is removed at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    directory: Path,
    model: GPT,
    tokenizer: TokenizerSpec,
    dtype: torch.dtype,
    files: Mapping[str, bytes],
) -> None:
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != TIED
    }
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)
    config = _Config("nanogpt", VERSION, model.config, _Tokenizer(tokenizer.kind))
    (directory / CONFIG).write_bytes(to_json(config))
    if tokenizer.kind == "char":
        (directory / CHARACTERS).write_bytes(to_json(list(tokenizer.characters)))
    elif tokenizer.directory:
        source, added = Path(tokenizer.directory), "added_tokens.json"
        for name in ("vocab.json", "merges.txt", *([added] if (source / added).exists() else [])):
            shutil.copyfile(source / name, directory / name)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def to_json(value: object) -> bytes:
    """A file that people can read."""
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"


def _move(source: Path, target: Path) -> None:
    if target.exists():
        old = source.with_name(source.name + ".old")
        os.rename(target, old)
        os.rename(source, target)
        shutil.rmtree(old)
    else:
        os.rename(source, target)


def read_config(directory: str | Path) -> tuple[GPTConfig, TokenizerSpec]:
    """Shape and tokenizer of a checkpoint, without its weights. Raises CheckpointError."""
    path = Path(directory)
    config = _decode(path / CONFIG, _Config)
    if config.version > VERSION:
        raise CheckpointError(
            f"{path / CONFIG} has version {config.version}, this program reads up to {VERSION}: "
            "update it"
        )
    return config.model, _tokenizer(path, config)


def _tokenizer(path: Path, config: _Config) -> TokenizerSpec:
    if config.tokenizer.kind == "char":
        characters = _decode(path / CHARACTERS, list[str])
        if any(len(c) != 1 for c in characters) or len(set(characters)) != len(characters):
            raise CheckpointError(f"{path / CHARACTERS}: each entry must be one character, once")
        if len(characters) > config.model.vocab_size:
            raise CheckpointError(
                f"{path / CHARACTERS} has {len(characters)} characters, "
                f"but the model knows {config.model.vocab_size}: restore the file that was trained"
            )
        return TokenizerSpec(kind="char", characters="".join(characters))
    own = (path / "vocab.json").exists() and (path / "merges.txt").exists()
    return TokenizerSpec(kind="gpt2", directory=str(path) if own else "")


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror}; a checkpoint is a directory with "
            f"{CONFIG} and {WEIGHTS}"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a nanogpt checkpoint's: {error}") from error


def load(
    directory: str | Path,
    dtype: WeightDtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[GPT, TokenizerSpec]:
    """The model, in evaluation mode, and its tokenizer. Raises CheckpointError.

    Weights are memory-mapped: stored in `dtype` and wanted on the CPU, they are not copied, and
    all processes on a machine share them through the page cache.
    """
    config, tokenizer = read_config(directory)
    model, shapes = outline(config)
    weights = _read_weights(Path(directory) / WEIGHTS, shapes, dtype, device)
    return fill(model, weights), tokenizer


def _read_weights(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    wanted: WeightDtype,
    device: str | torch.device,
) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, set(file.keys()), set(expected))
            weights = {}
            for name, shape in expected.items():
                weights[name] = file.get_tensor(name)
                if tuple(weights[name].shape) != shape:
                    raise CheckpointError(
                        f"{path}: {name} is {tuple(weights[name].shape)}, but {CONFIG} "
                        f"asks for {shape}: they are of different models"
                    )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't read {path} ({error}): copy or export it again") from error
    dtype = resolve(wanted, (tensor.dtype for tensor in weights.values()))
    return {name: tensor.to(device, dtype) for name, tensor in weights.items()}


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown {extra[0]}"
        raise CheckpointError(
            f"{path} {what}: it does not fit {CONFIG}, or comes from other software"
        )
