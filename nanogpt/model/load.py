"""Any source of weights, made into a model that is ready to serve."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from nanogpt.bpe_files import read_bpe_files
from nanogpt.errors import CheckpointError
from nanogpt.model import checkpoint, hub, huggingface, nanogpt_ckpt
from nanogpt.model.dtypes import WeightDtype
from nanogpt.model.gpt import GPT
from nanogpt.registry import ModelInfo, TokenizerSpec, is_hub_name

GPT2_VOCAB_SIZE, GPT2_END = 50257, 50256  # of GPT-2's own vocabulary


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, without gradients, and what others need to know of it."""

    model: GPT
    info: ModelInfo


def load_model(
    source: str,
    name: str,
    *,
    dtype: WeightDtype,
    device: str | torch.device,
    int8: bool = False,
    unknown: str = "",
) -> LoadedModel:
    """Load `source`, to be served as `name`. Raises CheckpointError, one clear line.

    A source is our own checkpoint directory, Hugging Face's GPT-2 directory, nanoGPT's ckpt.pt, or
    a name on the Hugging Face hub. Weights are read where they are, memory-mapped: nothing is
    converted on disk. Beyond the mapped file that takes the model's own memory and one tensor.
    `int8` says that products will be quantised (nanogpt/engine/cpu): then it is another model.
    `unknown` is what a character model is to read for characters that it does not know.
    """
    model, tokenizer, file = _load(source, dtype, device)
    if unknown:
        tokenizer = _with_unknown(source, tokenizer, unknown)
    vocab_size, eos_token_id, start_token_id = _vocabulary(tokenizer)
    if vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {vocab_size} ids, the model {model.config.vocab_size}: "
            "they are not of the same model"
        )
    info = ModelInfo(
        name=name,
        context_length=model.config.block_size,
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        start_token_id=start_token_id,
        tokenizer=tokenizer,
        dtype="int8" if int8 else str(model.wte.weight.dtype).removeprefix("torch."),
        fingerprint=fingerprint(model, b"int8" if int8 else b""),
        created=int(file.stat().st_mtime),
        num_parameters=model.num_parameters(),
    )
    return LoadedModel(model, info)


def _load(
    source: str, dtype: WeightDtype, device: str | torch.device
) -> tuple[GPT, TokenizerSpec, Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return nanogpt_ckpt.load(path, dtype, device)
    if not path.exists():
        if not is_hub_name(source):
            raise CheckpointError(f"there is no file or directory {path}")
        return huggingface.load(hub.find(source), dtype, device)
    if _is_ours(path):
        model, tokenizer = checkpoint.load(path, dtype, device)
        return model, tokenizer, path / checkpoint.WEIGHTS
    return huggingface.load(path, dtype, device)


def _with_unknown(source: str, spec: TokenizerSpec, unknown: str) -> TokenizerSpec:
    if spec.kind != "char" or unknown not in spec.characters:
        raise CheckpointError(
            f"{source}: {unknown!r} can't stand for unknown characters, as its card says: it is "
            "none of the model's"
        )
    return msgspec.structs.replace(spec, unknown=unknown)


class _Format(msgspec.Struct):
    format: str = ""


def _is_ours(directory: Path) -> bool:
    try:
        config = msgspec.json.decode((directory / checkpoint.CONFIG).read_bytes(), type=_Format)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"can't read {directory / checkpoint.CONFIG}: {error}") from error
    return config.format == "nanogpt"


def _vocabulary(spec: TokenizerSpec) -> tuple[int, int | None, int]:
    """Number of ids, end token and start token, without building the tokenizer."""
    if spec.kind == "char":
        return len(spec.characters), None, max(0, spec.characters.find("\n"))
    if not spec.directory:
        return GPT2_VOCAB_SIZE, GPT2_END, GPT2_END
    files = read_bpe_files(spec.directory)
    return files.n_vocab, files.end_of_text, files.end_of_text


@torch.no_grad()
def fingerprint(model: GPT, key: bytes = b"") -> str:
    """16 hexadecimal digits of configuration, dtype and every weight: a change of one shows.

    `key` stands for whatever else makes this another model.

    Not of the file, so that one model in several formats has one fingerprint. Each tensor counts
    by the sums of its rows and of its columns, of bit patterns modulo 2**64: that runs at the
    speed of memory, and only a change of four weights or more, made on purpose, can slip through.
    """
    digest = hashlib.blake2b(msgspec.json.encode(model.config), digest_size=8, key=key)
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for sums in _bit_sums(tensor):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _bit_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of rows, and of columns, of the bits as whole numbers; (R, C) to (R,) and (C,)."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
    if rows.shape[-1] * rows.element_size() % 8 == 0:
        bits = rows.view(torch.int64)  # fewer, wider numbers: faster
    else:
        bits = rows.view(torch.uint8)
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)
