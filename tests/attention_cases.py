"""Texts, block tables and steps for tests of paged attention, and running them on a backend."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt.engine.attention import (
    AttentionBackend,
    AttentionMetadata,
    PagedAttend,
    Span,
    allocate_kv_cache,
)
from nanogpt.model.gpt import GPTConfig

BLOCK = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Text:
    """Queries, keys and values of one sequence, (T, n_head, head_size) each, one layer."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(
        cls, length: int, n_head: int, head_size: int, dtype: torch.dtype, seed: int
    ) -> "Text":
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, length, n_head, head_size, generator=generator).to(dtype)
        return cls(q * 2, k, v)

    def __len__(self) -> int:
        return len(self.q)

    def sharing(self, prefix: "Text", length: int) -> "Text":
        """This text with its first `length` keys and values taken from `prefix`."""
        k, v = self.k.clone(), self.v.clone()
        k[:length], v[:length] = prefix.k[:length], prefix.v[:length]
        return Text(self.q, k, v)

    def reference(self) -> Tensor:
        """Causal attention in float64, from the definition."""
        q, k, v = (x.double().transpose(0, 1) for x in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (nh, T, T)
        future = torch.ones(len(self), len(self), dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)


# What one step computes: (sequence, first position, end position) of each span.
Step = list[tuple[int, int, int]]


def attend_all(
    backend: AttentionBackend,
    texts: list[Text],
    tables: list[list[int]],
    steps: list[Step],
    *,
    device: str = "cpu",
    fill: float | None = None,
) -> list[dict[int, Tensor]]:
    """Run the steps over a fresh cache; answers of each text by position. `fill` is what unused
    slots of the cache hold."""
    _, n_head, head_size = texts[0].q.shape
    config = GPTConfig(n_layer=1, n_head=n_head, n_embd=n_head * head_size)
    num_blocks = 1 + max(block for table in tables for block in table)
    dtype = texts[0].q.dtype
    cache = allocate_kv_cache(config, num_blocks, BLOCK, dtype, device, backend=backend)
    if fill is not None:
        cache.keys.fill_(fill)
        cache.values.fill_(fill)
    answers: list[dict[int, Tensor]] = [{} for _ in texts]
    for step in steps:
        spans = [Span(start, end, tables[i]) for i, start, end in step]
        parts = [
            torch.stack([x[start:end] for x in (texts[i].q, texts[i].k, texts[i].v)], 1)
            for i, start, end in step
        ]
        qkv = torch.cat(parts).to(device)  # (N, 3, nh, hs): the strides of the network's views
        metadata = AttentionMetadata.build(spans, BLOCK, device)
        rows = iter(PagedAttend(cache, metadata)(0, *qkv.unbind(1)).cpu())
        for i, start, end in step:
            answers[i].update({position: next(rows) for position in range(start, end)})
    return answers


def paged(lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Block tables over a shuffled cache."""
    counts = [-(-length // BLOCK) for length in lengths]
    blocks = rng.sample(range(sum(counts) + 3), sum(counts))
    return [[blocks.pop() for _ in range(count)] for count in counts]


def chunked(lengths: list[int], rng: random.Random, most: int) -> list[Step]:
    """Steps that compute every position once, in chunks of random sizes, in random company."""
    done = [0] * len(lengths)
    steps = []
    while any(d < length for d, length in zip(done, lengths, strict=True)):
        step: Step = []
        order = list(range(len(lengths)))
        rng.shuffle(order)
        for i in order:
            size = min(rng.choice([0, 1, 1, 2, rng.randint(1, most)]), lengths[i] - done[i])
            if size:
                step.append((i, done[i], done[i] + size))
                done[i] += size
        if step:
            steps.append(step)
    return steps


def assert_same(a: list[dict[int, Tensor]], b: list[dict[int, Tensor]]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.keys() == y.keys()
        for position in x:
            assert torch.equal(x[position], y[position]), f"text {i}, position {position}"


def assert_is_attention(answers: list[dict[int, Tensor]], texts: list[Text]) -> None:
    """The answers are those of the definition, to the rounding of their type."""
    for text, answer in zip(texts, answers, strict=True):
        ours = torch.stack([answer[position] for position in range(len(text))])
        tolerance = TOLERANCE[text.q.dtype]
        torch.testing.assert_close(ours.double(), text.reference(), rtol=tolerance, atol=tolerance)
