"""How well a model predicts a text: every token's loss, given what stands before it.

Two ways to cut a text that is longer than the context, n tokens into windows of T:

    consecutive   [0 ... T)[T ... 2T)[2T ...      each token but the first has 0 to T - 1 before it
    strided       [0 ........ T)                  after the first window all have T - stride at the
                      [stride ... stride + T)     least, since only a window's new tokens count

The first is what training reports (and leaves out an incomplete last window, as it does), the
second comes nearer to what the model is worth, at T / stride times the price.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nanogpt.data.dataset import batch_at, evaluation_starts
from nanogpt.errors import ConfigError
from nanogpt.model.gpt import GPT, CausalAttend
from nanogpt.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # enough rows for full speed
HEAD_ROWS = 512  # rows of logits at a time: 103 MB for GPT-2


@dataclass(frozen=True)
class Window:
    """Inputs are tokens [start, start + length); what follows each is predicted, and counts from
    the input number `skip` on."""

    start: int
    length: int
    skip: int = 0


@dataclass(frozen=True)
class Score:
    """Sums over the tokens that counted."""

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def bits_per_byte(self) -> float:
        """Of UTF-8."""
        return self.nats / math.log(2) / self.bytes


def windows_of(num_tokens: int, block_size: int, stride: int = 0) -> list[Window]:
    """Consecutive windows, or with a `stride` (1 to block_size) overlapping ones in which each
    token but the first counts once. Raises ConfigError."""
    if not 0 <= stride <= block_size:
        raise ConfigError(f"the stride must be from 1 to the context, {block_size}, not {stride}")
    if stride:
        windows = [*_strided(num_tokens, block_size, stride)]
    else:
        starts = evaluation_starts(num_tokens, block_size, 0)
        windows = [Window(start, block_size) for start in starts.tolist()]
    if not windows:
        raise ConfigError(
            f"{num_tokens} tokens are too few for a window of {block_size} and one more: "
            "give more text, or a stride"
        )
    return windows


def _strided(num_tokens: int, block_size: int, stride: int) -> Iterator[Window]:
    counted = 0  # the last token that did; the first has nothing before it
    for start in range(0, num_tokens - 1, stride):
        end = min(start + block_size, num_tokens - 1)
        yield Window(start, end - start, counted - start)
        counted = end
        if end == num_tokens - 1:
            return


@torch.inference_mode()
def score(
    model: GPT, tokenizer: Tokenizer, tokens: np.ndarray, windows: list[Window], *, quiet: bool
) -> Score:
    """Score tokens (n,) in windows of them. Rows of the embedding that are no token's have no
    share of the probability, as when the model is served."""
    device = model.wte.weight.device
    lengths, heads = _sizes(tokenizer)
    total, count, num_bytes, characters = 0.0, 0, 0, 0
    with tqdm(total=sum(w.length for w in windows), unit="token", disable=quiet) as bar:
        for batch in _batches(windows):
            starts = np.array([w.start for w in batch])
            x, y = batch_at(tokens, starts, batch[0].length)
            counts = np.arange(batch[0].length) >= np.array([[w.skip] for w in batch])
            wanted = torch.from_numpy(counts).to(device)
            total += _nats(model, x.to(device), y.to(device), wanted, tokenizer.n_vocab)
            targets = y.numpy()[counts]
            count += len(targets)
            num_bytes += int(lengths[targets].sum())
            characters += int(heads[targets].sum())
            bar.update(batch[0].length * len(batch))
    return Score(total, count, characters, num_bytes)


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Windows of equal length, together up to BATCH_TOKENS."""
    for length, group in itertools.groupby(windows, key=lambda w: w.length):
        same = [*group]
        size = max(1, BATCH_TOKENS // length)
        for i in range(0, len(same), size):
            yield same[i : i + size]


def _nats(model: GPT, x: Tensor, y: Tensor, wanted: Tensor, vocab_size: int) -> float:
    """Summed losses of targets y (B, T) that are wanted, for inputs x (B, T)."""
    positions = torch.arange(x.size(1), device=x.device)
    hidden = model.hidden(x, positions, CausalAttend())[wanted]  # (N, C)
    total = 0.0
    for rows, targets in zip(hidden.split(HEAD_ROWS), y[wanted].split(HEAD_ROWS), strict=True):
        logits = model.lm_head(rows)[:, :vocab_size].float()
        total += F.cross_entropy(logits, targets, reduction="none").double().sum().item()
    return total


def _sizes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each token, and how many characters begin in it: of any sequence they sum up."""
    texts = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
    heads = [sum(byte & 0xC0 != 0x80 for byte in text) for text in texts]
    return np.array([len(text) for text in texts]), np.array(heads)
