"""What a model is evaluated on: a part of a text, as the model's tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nanogpt.data.dataset import Dataset
from nanogpt.data.prepare import decoded, read_file, split
from nanogpt.errors import ConfigError, InvalidRequest
from nanogpt.registry import ModelInfo
from nanogpt.tokenizer import BPETokenizer, Tokenizer

Part = Literal["val", "train", "all"]
PARTS = {"val": "the last 10 %", "train": "the first 90 %", "all": "all of it"}


@dataclass(frozen=True)
class Text:
    tokens: np.ndarray  # (n,)
    name: str
    sha256: str  # of the whole text


def read(path: Path, part: Part, info: ModelInfo, tokenizer: Tokenizer) -> Text:
    """Of a UTF-8 text, or of a directory that `nanogpt prepare` wrote. Raises ConfigError."""
    if path.is_dir():
        return _prepared(path, part, info)
    content = read_file(path)
    whole = decoded(content, str(path))
    train, val = split(whole)
    text = {"train": train, "val": val, "all": whole}[part]
    # As `nanogpt prepare` does: a special token that is written out is text.
    encode = tokenizer.encode_ordinary if isinstance(tokenizer, BPETokenizer) else tokenizer.encode
    try:
        tokens = np.array(encode(text), np.int64)
    except InvalidRequest as error:
        raise ConfigError(f"{path}: {error.message.replace('the prompt', 'the text')}") from error
    return Text(tokens, path.name, hashlib.sha256(content).hexdigest())


def _prepared(path: Path, part: Part, info: ModelInfo) -> Text:
    data = Dataset(path)
    if not data.meta.fits(info):
        raise ConfigError(f"{path} has other tokens than the model: give the text itself")
    parts = {"train": [data.train], "val": [data.val], "all": [data.train, data.val]}[part]
    return Text(np.concatenate(parts), data.meta.source, data.meta.source_sha256)
