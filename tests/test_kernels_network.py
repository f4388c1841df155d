"""Whole networks on the CPU kernels: bit for bit in any batch, fused or layer by layer."""

import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanogpt.engine.attention import AttentionMetadata, PagedAttend, Span, allocate_kv_cache
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import pack_model
from nanogpt.engine.cpu.network import FusedHidden
from nanogpt.model.gpt import GPT, CausalAttend
from tests.engine_utils import threads
from tests.small_gpt import small_gpt

pytestmark = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
BLOCK = 16
# Of final hidden states: keys and values, and in int8 all rows, are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.int8: 0.3}


def packed(dtype: torch.dtype, activation: str = "gelu", bias: bool = True) -> GPT:
    """A small model with weights of this type on the kernels."""
    int8 = dtype == torch.int8
    model = small_gpt(torch.float32 if int8 else dtype, activation, bias)
    pack_model(model, int8=int8)
    return model


def hidden_in_chunks(
    model: GPT, texts: list[Tensor], rng: random.Random, *, fused: bool = True
) -> list[Tensor]:
    """Final hidden states of each text, in chunks of random sizes that run in random company."""
    cache = allocate_kv_cache(model.config, 64, BLOCK, model.wte.weight.dtype)
    compute = model.hidden if fused else partial(GPT.hidden, model)
    blocks = rng.sample(range(64), 64)
    tables = [[blocks.pop() for _ in range(-(-len(text) // BLOCK))] for text in texts]
    done, parts = [0] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    while waiting := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        chosen = rng.sample(waiting, rng.randint(1, len(waiting)))
        sizes = [
            min(rng.choice([1, 1, rng.randint(1, 90)]), len(texts[i]) - done[i]) for i in chosen
        ]
        runs = list(zip(chosen, sizes, strict=True))
        spans = [Span(done[i], done[i] + size, tables[i]) for i, size in runs]
        metadata = AttentionMetadata.build(spans, BLOCK)
        ids = torch.cat([texts[i][done[i] : done[i] + size] for i, size in runs])
        hidden = compute(ids, metadata.positions, PagedAttend(cache, metadata))
        for (i, size), part in zip(runs, hidden.split(sizes), strict=True):
            parts[i].append(part)
            done[i] += size
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=5), seed=st.integers(0, 99))
@torch.inference_mode()
def test_the_same_to_the_bit_in_any_chunks(
    dtype: torch.dtype, lengths: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    model = packed(dtype)
    texts = [torch.randint(65, (length,)) for length in lengths]
    first = hidden_in_chunks(model, texts, rng)
    second = hidden_in_chunks(model, texts, rng)
    alone = [hidden_in_chunks(model, [text], rng)[0] for text in texts]
    logits = [model.lm_head(rows) for rows in first]
    for i in range(len(texts)):
        assert torch.equal(first[i], second[i])
        assert torch.equal(first[i], alone[i])
        for row in range(len(texts[i])):
            assert torch.equal(model.lm_head(first[i][row : row + 1])[0], logits[i][row])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_fused_is_layer_by_layer_is_the_definition(
    dtype: torch.dtype, activation: str, bias: bool
) -> None:
    model = packed(dtype, activation, bias)
    texts = [torch.randint(65, (length,)) for length in (1, 40, 100)]
    assert isinstance(model.hidden, FusedHidden)
    fused = hidden_in_chunks(model, texts, random.Random(1))
    layered = hidden_in_chunks(model, texts, random.Random(2), fused=False)
    stored = torch.float32 if dtype == torch.int8 else dtype
    plain = small_gpt(stored, activation, bias).float()
    for text, a, b in zip(texts, fused, layered, strict=True):
        assert torch.equal(a, b)
        expected = plain.hidden(text, torch.arange(len(text)), CausalAttend())
        torch.testing.assert_close(a, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@torch.inference_mode()
def test_threads_do_not_matter() -> None:
    model = packed(torch.bfloat16)
    texts = [torch.randint(65, (length,)) for length in (3, 50, 100)]
    answers = []
    for count in (1, 2, 3):
        with threads(count):
            answers.append(torch.cat(hidden_in_chunks(model, texts, random.Random(1))))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": torch.tensor([65])}, "token 65 does not exist"),
        ({"ids": torch.tensor([-1])}, "token -1 does not exist"),
        ({"ids": torch.tensor([1, 2])}, "metadata must describe every row"),
        ({"slots": torch.tensor([32])}, "outside the cache"),
        ({"positions": torch.tensor([16])}, "past its block table"),
        ({"block_tables": torch.tensor([[2]], dtype=torch.int32)}, "block 2 does not exist"),
    ],
)
@torch.inference_mode()
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], words: str) -> None:
    model = packed(torch.float32)
    cache = allocate_kv_cache(model.config, 2, BLOCK, torch.float32)
    metadata = AttentionMetadata.build([Span(0, 1, [0])], BLOCK)
    ids = change.pop("ids", torch.tensor([1]))
    for name, tensor in change.items():
        setattr(metadata, name, tensor)
    with pytest.raises(RuntimeError, match=words):
        model.hidden(ids, metadata.positions, PagedAttend(cache, metadata))
