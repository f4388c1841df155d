"""Any source of weights, made into a model that is ready to serve."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from nanogpt.bpe_files import read_bpe_files
from nanogpt.errors import CheckpointError
from nanogpt.model import checkpoint, hub, huggingface, nanogpt_ckpt
from nanogpt.model.dtypes import WeightDtype
from nanogpt.model.fingerprint import BitSums, fingerprint
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
    packing: BitSums | None = None,
) -> LoadedModel:
    """Load `source`, to be served as `name`. Raises CheckpointError, one clear line.

    A source is our own checkpoint directory, Hugging Face's GPT-2 directory, nanoGPT's ckpt.pt, or
    a name on the Hugging Face hub. Weights are read where they are, memory-mapped: nothing is
    converted on disk. Beyond the mapped file that takes the model's own memory and one tensor.
    `int8` says that products will be quantised (nanogpt/engine/cpu): then it is another model.
    `unknown` is what a character model is to read for characters that it does not know.
    `packing` is for a caller who packs the matrices at once, and so needs no copies of them: they
    may be transposed views of the file, and `packing` sums their bits, for the fingerprint.
    """
    model, tokenizer, file = _load(source, dtype, device, views=packing is not None)
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
        fingerprint=fingerprint(model, b"int8" if int8 else b"", packing),
        created=int(file.stat().st_mtime),
        num_parameters=model.num_parameters(),
    )
    return LoadedModel(model, info)


def _load(
    source: str, dtype: WeightDtype, device: str | torch.device, *, views: bool
) -> tuple[GPT, TokenizerSpec, Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return nanogpt_ckpt.load(path, dtype, device)
    if not path.exists():
        if not is_hub_name(source):
            raise CheckpointError(f"there is no file or directory {path}")
        return huggingface.load(hub.find(source), dtype, device, views=views)
    if _is_ours(path):
        model, tokenizer = checkpoint.load(path, dtype, device)
        return model, tokenizer, path / checkpoint.WEIGHTS
    return huggingface.load(path, dtype, device, views=views)


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
