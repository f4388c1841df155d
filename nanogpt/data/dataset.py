"""Prepared data: what `prepare` wrote, as windows of tokens for training and evaluation."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from nanogpt.bpe_files import has_bpe_files, read_bpe_files
from nanogpt.errors import ConfigError
from nanogpt.registry import ModelInfo, TokenizerSpec


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """meta.json: how the text became tokens."""

    tokenizer: TokenizerSpec
    vocab_size: int
    train_tokens: int
    val_tokens: int
    source: str  # name of the text
    source_sha256: str

    def fits(self, info: ModelInfo) -> bool:
        """Whether a model's ids stand for the same text as these."""
        ours, theirs = self.tokenizer, info.tokenizer
        if ours.kind == theirs.kind == "gpt2" and ours.directory and theirs.directory:
            return read_bpe_files(ours.directory) == read_bpe_files(theirs.directory)
        same = (ours.kind, ours.characters) == (theirs.kind, theirs.characters)
        return same and self.vocab_size == info.vocab_size


class Dataset:
    """The two splits of one text, memory-mapped."""

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        try:
            self.meta = _read_meta(path)
            self.train = np.memmap(path / "train.bin", dtype="<u2", mode="r")
            self.val = np.memmap(path / "val.bin", dtype="<u2", mode="r")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise ConfigError(
                f"no prepared data at {path} ({error}): run `python -m nanogpt.data.prepare` first"
            ) from error
        sizes = (len(self.train), len(self.val))
        if sizes != (self.meta.train_tokens, self.meta.val_tokens):
            raise ConfigError(f"{path}: {sizes} tokens, meta.json says otherwise: prepare it again")


def _read_meta(path: Path) -> Meta:
    """With the place of the vocabulary's files, which are beside the data."""
    meta = msgspec.json.decode((path / "meta.json").read_bytes(), type=Meta)
    if meta.tokenizer.kind == "char" or not has_bpe_files(path):
        return meta
    tokenizer = msgspec.structs.replace(meta.tokenizer, directory=str(path))
    return msgspec.structs.replace(meta, tokenizer=tokenizer)


def batch_at(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, block_size), int64, of the windows that begin at `starts` (B,)."""
    rows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    rows_t = torch.from_numpy(rows)  # (B, T + 1)
    return rows_t[:, :-1], rows_t[:, 1:]


class WindowSampler:
    """Training windows in a random order that uses every token once an epoch.

    Each epoch cuts the text into consecutive windows, beginning at a random phase, and shuffles
    them. Window number g is a pure function of (seed, g): a resumed run and any number of ranks
    see the same windows in the same order. nanoGPT draws starts independently instead, which
    leaves out a third of the text in each pass over its length.
    """

    def __init__(self, num_tokens: int, block_size: int, seed: int) -> None:
        self.windows = (num_tokens - 1) // block_size - 1  # so that every phase fits
        if self.windows < 1:
            raise ConfigError(
                f"{num_tokens} training tokens are too few for windows of {block_size}: "
                "use more text or a smaller block_size"
            )
        self.block_size, self.seed = block_size, seed
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Starts (count,) of the windows numbered first, first + 1, ..."""
        return np.array([self._start(g) for g in range(first, first + count)], np.int64)

    def _start(self, g: int) -> int:
        epoch, index = divmod(g, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            phase = rng.integers(self.block_size)
            self._starts = phase + self.block_size * rng.permutation(self.windows)
            self._epoch = epoch
        return int(self._starts[index])


def evaluation_starts(num_tokens: int, block_size: int, limit: int) -> np.ndarray:
    """Starts of consecutive windows of a split; at most `limit` (0: all), evenly spaced."""
    starts = np.arange(0, num_tokens - block_size, block_size)
    if 0 < limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).astype(np.int64)]
    return starts


def chunks(starts: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`starts` in pieces of at most `size`."""
    for i in range(0, len(starts), size):
        yield starts[i : i + size]
