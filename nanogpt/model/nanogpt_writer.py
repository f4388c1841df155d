"""A model as nanoGPT's sample.py loads it: a directory with ckpt.pt, and meta.pkl of characters."""

from pathlib import Path
from typing import Any

import msgspec
import torch

from nanogpt.errors import CheckpointError
from nanogpt.model.checkpoint import new_directory
from nanogpt.model.load import GPT2_VOCAB_SIZE, LoadedModel
from nanogpt.model.pickles import write_plain_pickle


def write_nanogpt(loaded: LoadedModel, directory: Path) -> None:
    """Written for inference: there is no state of an optimiser, so train.py can't resume from it.

    sample.py looks for meta.pkl in data/<name of the directory>/; put it there. Raises
    CheckpointError for a model that nanoGPT would compute otherwise, and when the directory is
    there already.
    """
    check_expressible(loaded)
    with new_directory(directory) as temporary:
        torch.save(_checkpoint(loaded, directory.name), temporary / "ckpt.pt")
        if loaded.info.tokenizer.kind == "char":
            write_plain_pickle(temporary / "meta.pkl", _meta(loaded.info.tokenizer.characters))


def check_expressible(loaded: LoadedModel) -> None:
    """Raises CheckpointError that says what nanoGPT's format can't say."""
    if loaded.model.config.activation != "gelu":
        raise CheckpointError(
            "nanoGPT's network has the exact GELU, this model the tanh approximation of OpenAI's: "
            "its logits would differ there; convert it for transformers (--to hf) instead"
        )
    if loaded.info.tokenizer.kind == "gpt2" and loaded.info.vocab_size != GPT2_VOCAB_SIZE:
        raise CheckpointError(
            f"nanoGPT knows GPT-2's {GPT2_VOCAB_SIZE} byte pairs or characters, and this model has "
            f"{loaded.info.vocab_size} byte pairs of its own; convert it for transformers (--to hf)"
        )


def _checkpoint(loaded: LoadedModel, dataset: str) -> dict[str, Any]:
    shape = msgspec.to_builtins(loaded.model.config)
    del shape["activation"]
    state = {
        name if name.startswith("lm_head") else f"transformer.{name}": tensor.detach()
        for name, tensor in loaded.model.state_dict().items()
    }
    return {
        "model": state,
        "model_args": {**shape, "dropout": 0.0},
        "iter_num": 0,
        "config": {"dataset": dataset},
    }


def _meta(characters: str) -> dict[str, Any]:
    stoi = {c: i for i, c in enumerate(characters)}
    return {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
