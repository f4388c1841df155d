"""The Triton kernels: compiled where there is a GPU, else in Triton's interpreter (conftest.py)."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanogpt.engine import attention
from nanogpt.engine.engine import Engine
from nanogpt.model.gpt import GPT, GPTConfig
from tests.attention_cases import (
    Step,
    Text,
    assert_is_attention,
    assert_same,
    attend_all,
    chunked,
    paged,
)
from tests.engine_utils import model_info, request, run_all

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
triton_backend = pytest.importorskip("nanogpt.engine.cuda.triton_backend")
TritonBackend = triton_backend.TritonBackend

NAN = float("nan")  # in slots that nobody has written
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANY = 10**6  # programs: as if the GPU were never busy enough, so that keys are split


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter holds bfloat16 as 16-bit numbers, and would multiply these. And it
    has BLAS multiply tiles, where on some CPUs a row's sum depends on its place in the tile."""

    def widened(handle):  # type: ignore[no-untyped-def]
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):  # type: ignore[no-untyped-def]
        x, y = widened(a).data, widened(b).data
        product = np.einsum("ij,jk->ik", x, y, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("fixed_tiles", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_size"), [*zip(DTYPES, (40, 64, 32), strict=True), (torch.float32, 128)]
)
def test_agrees_with_the_definition(dtype: torch.dtype, head_size: int, fixed_tiles: bool) -> None:
    """NaN in slots that are not in use must not show."""
    rng = random.Random(head_size)
    lengths = [1, 19, 35]
    texts = [Text.random(n, 2, head_size, dtype, i) for i, n in enumerate(lengths)]
    backend = TritonBackend(fixed_tiles=fixed_tiles)
    steps = chunked(lengths, rng, 20)
    answers = attend_all(backend, texts, paged(lengths, rng), steps, device=DEVICE, fill=NAN)
    assert_is_attention(answers, texts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_keys_does_not_change_a_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts folded by another kernel, or by the same program: one answer, and the right one."""
    monkeypatch.setattr(triton_backend, "SPLIT", 64)
    rng = random.Random(3)
    lengths = [150, 129, 64]
    texts = [Text.random(n, 1, 32, dtype, i) for i, n in enumerate(lengths)]
    prefill: Step = [(i, 0, n - 2) for i, n in enumerate(lengths)]
    decode: list[Step] = [[(i, n - k, n - k + 1) for i, n in enumerate(lengths)] for k in (2, 1)]
    tables = paged(lengths, rng)
    for fixed_tiles in (False, True):
        whole, split = (
            attend_all(
                TritonBackend(fixed_tiles=fixed_tiles, enough_programs=enough),
                texts,
                tables,
                [prefill, *decode],
                device=DEVICE,
                fill=NAN,
            )
            for enough in (0, MANY)
        )
        assert_same(whole, split)
        assert_is_attention(whole, texts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_tiles_are_the_same_to_the_bit_in_any_chunk_and_batch(dtype: torch.dtype) -> None:
    rng = random.Random(11)
    lengths = [37, 18]
    texts = [Text.random(n, 1, 24, dtype, i) for i, n in enumerate(lengths)]
    alone: list[Step] = [[(i, 0, n)] for i, n in enumerate(lengths)]
    backend = TritonBackend(fixed_tiles=True)
    expected = attend_all(backend, texts, paged(lengths, rng), alone, device=DEVICE, fill=NAN)
    for most in (3, 30):
        steps = chunked(lengths, rng, most)
        found = attend_all(backend, texts, paged(lengths, rng), steps, device=DEVICE, fill=NAN)
        assert_same(found, expected)


def test_decoded_rows_are_the_same_to_the_bit_in_any_batch() -> None:
    rng = random.Random(12)
    lengths = [40, 21, 33]
    texts = [Text.random(n, 2, 32, torch.float32, i) for i, n in enumerate(lengths)]
    prompts = [n - 3 for n in lengths]
    together: list[Step] = [[(i, 0, n) for i, n in enumerate(prompts)]] + [
        [(i, n + k, n + k + 1) for i, n in enumerate(prompts)] for k in range(3)
    ]
    alone = [[part] for step in together for part in step]
    backend = TritonBackend()
    assert_same(
        attend_all(backend, texts, paged(lengths, rng), together, device=DEVICE, fill=NAN),
        attend_all(backend, texts, paged(lengths, rng), alone, device=DEVICE, fill=NAN),
    )


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    text = Text.random(40, 1, 32, torch.float32, 1)
    text.q *= 300  # scores of a few thousand: one key takes all the weight
    for fixed_tiles in (False, True):
        backend = TritonBackend(fixed_tiles=fixed_tiles)
        steps: list[Step] = [[(0, 0, 39)], [(0, 39, 40)]]
        answer = attend_all(backend, [text], [[2, 0, 1]], steps, device=DEVICE)[0]
        ours = torch.stack([answer[p] for p in range(40)]).double()
        torch.testing.assert_close(ours, text.reference(), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py has more")
@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_with_these_kernels(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """Prefill in chunks, bursts of decode steps with idle rows, a cache with a spare block: the
    same tokens as with attention for CPUs; with fixed tiles to the bit in any chunks."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=48, vocab_size=72, n_layer=1, n_head=2, n_embd=32)).eval()
    model.init_weights()
    for param in model.parameters():
        param.data.mul_(6 if param.dim() == 2 else 1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(72, 32))
    loaded = SimpleNamespace(model=model, info=model_info(48))
    prompt = [7 * i % 65 for i in range(21)]
    requests = [
        request("a", prompt, n=3, max_tokens=9, logprobs=None, seed=5),
        request("b", prompt[:18], max_tokens=6, logprobs=0, temperature=0.0),
    ]
    options = {"rank": 0, "device": "cpu", "num_kv_blocks": 20, "max_num_seqs": 5}
    expected = run_all(Engine(loaded, **options), *requests)
    backend = TritonBackend(fixed_tiles=deterministic)
    monkeypatch.setattr(attention, "select_backend", lambda *_, **__: backend)
    results = [
        run_all(Engine(loaded, **options, max_batch_tokens=budget, burst_steps=steps), *requests)
        for budget, steps in ((64, 4), (16, 0))
    ]
    for result in results:
        assert result.tokens == expected.tokens
    if deterministic:
        assert results[0].logprobs == results[1].logprobs
