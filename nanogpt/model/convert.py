"""Write any model that can be loaded as a checkpoint of ours, of Hugging Face's or of nanoGPT's.

    nanogpt convert out/ckpt.pt out/mine                    nanoGPT's as a checkpoint of ours
    nanogpt convert shakespeare-char out/hf --to hf         for transformers
    nanogpt convert out/mine/best out/theirs --to nanogpt   for nanoGPT's sample.py
    nanogpt convert gpt2-xl out/half --dtype float16        half of the download

SOURCE is all that --model takes: a known name, a directory, a ckpt.pt or a name on the hub.
Weights keep their type unless --dtype says otherwise, so nothing is lost in any direction.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nanogpt import registry
from nanogpt.bpe_files import read_bpe_files
from nanogpt.errors import CheckpointError, StartupError
from nanogpt.model import checkpoint
from nanogpt.model.dtypes import DTYPES, as_stored
from nanogpt.model.gpt import GPT
from nanogpt.model.huggingface import CONV1D
from nanogpt.model.load import LoadedModel, load_model
from nanogpt.model.nanogpt_writer import write_nanogpt
from nanogpt.registry import ModelInfo, TokenizerSpec
from nanogpt.tokenizer import gpt2_files


def write_ours(loaded: LoadedModel, directory: Path) -> None:
    """A checkpoint that needs nothing of its source."""
    spec, files = loaded.info.tokenizer, {checkpoint.CARD: _card(loaded.info)}
    if spec.directory:
        files |= read_bpe_files(spec.directory).as_files()
        spec = TokenizerSpec(kind="gpt2")
    dtype = next(loaded.model.parameters()).dtype
    checkpoint.save(directory, loaded.model, spec, dtype=dtype, files=files)


def _card(info: ModelInfo) -> bytes:
    return (
        f"# {info.name}\n\n{info.num_parameters:,} parameters in {info.dtype}, context "
        f"{info.context_length}, vocabulary {info.vocab_size}. Converted from other weights, whose "
        f"licence holds on. Fingerprint {info.fingerprint}.\n"
    ).encode()


def write_hugging_face(loaded: LoadedModel, directory: Path) -> None:
    """A directory for transformers' AutoModelForCausalLM and AutoTokenizer.

    Rows of padding are left out, and biases that the model lacks are written as zeros.
    """
    with checkpoint.new_directory(directory) as temporary:
        weights = _their_names(loaded.model, loaded.info.vocab_size)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in (_config_files(loaded) | _tokenizer_files(loaded.info)).items():
            (temporary / name).write_bytes(content)
        for path in temporary.iterdir():
            path.chmod(0o644)


def _their_names(model: GPT, vocab_size: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        tensor = param.detach()
        if name == "wte.weight":
            tensor = tensor[:vocab_size]
        if not model.config.bias and not name.startswith(("wte", "wpe")):
            bias = name.removesuffix("weight") + "bias"  # one for each output
            weights[f"transformer.{bias}"] = tensor.new_zeros(tensor.shape[0])
        if CONV1D.fullmatch(name):
            tensor = tensor.t()
        weights[f"transformer.{name}"] = tensor.contiguous()
    return weights


def _config_files(loaded: LoadedModel) -> dict[str, bytes]:
    shape, info = loaded.model.config, loaded.info
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if shape.activation == "gelu_tanh" else "gelu",
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "vocab_size": info.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": info.start_token_id,
        "eos_token_id": info.eos_token_id,
        "dtype": info.dtype,
    }
    return {"config.json": checkpoint.to_json(config)}


def _tokenizer_files(info: ModelInfo) -> dict[str, bytes]:
    spec = info.tokenizer
    settings: dict[str, Any] = {"model_max_length": info.context_length}
    if spec.kind == "gpt2":
        files = read_bpe_files(spec.directory) if spec.directory else gpt2_files()
        settings |= {"tokenizer_class": "GPT2Tokenizer"}
        return files.as_files() | {"tokenizer_config.json": checkpoint.to_json(settings)}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    by_character = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {c: i for i, c in enumerate(spec.characters)},
            "unk_token": "",  # none: an unknown character is an error
        },
    }
    return {
        "tokenizer.json": checkpoint.to_json(by_character),
        "tokenizer_config.json": checkpoint.to_json(settings),
    }


WRITERS = {"ours": write_ours, "hf": write_hugging_face, "nanogpt": write_nanogpt}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nanogpt convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="name, directory, ckpt.pt or hub name")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    parser.add_argument("--to", choices=WRITERS, default="ours", help="format (ours)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as they are)")
    options = parser.parse_args(argv)
    dtype = DTYPES[options.dtype] if options.dtype else as_stored
    try:
        _, source = registry.any_source(options.source)
        if options.out.is_file():
            raise CheckpointError(f"{options.out} is a file: give a directory to write")
        checkpoint.check_new(options.out)
        loaded = load_model(source, options.out.name, dtype=dtype, device="cpu")
        WRITERS[options.to](loaded, options.out)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: can't write {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{options.out}: {loaded.info.num_parameters:,} parameters in {loaded.info.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
