"""On a GPU: against float32 on the CPU, graphs against plain steps, and bits where they are due.

The kernels themselves are in test_triton.py, which compiles them where there is a GPU.
"""

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from nanogpt.engine.attention import TorchBackend, select_backend
from nanogpt.engine.cuda import linear, memory, varlen
from nanogpt.engine.cuda.linear import Head, TiledLinear
from nanogpt.engine.decode import choose
from nanogpt.engine.engine import Engine
from nanogpt.engine.inverse_cdf import padded_width
from nanogpt.engine.model_runner import ModelRunner
from nanogpt.model.gpt import CausalAttend
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest
from tests.attention_cases import Text, assert_is_attention, attend_all, chunked, paged
from tests.engine_utils import VOCAB_SIZE, Collector, prompt_of, request, run_all, tiny_gpt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

CONTEXT = 256
CUDA = torch.device("cuda", 0)
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not (
                torch.cuda.is_available()
                and torch.cuda.is_bf16_supported(including_emulation=False)
            ),
            reason="this GPU has no bfloat16",
        ),
    ),
]
# Of log probabilities, after two layers.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    """In float32, on the CPU."""
    return tiny_gpt(CONTEXT, n_embd=128, gain=4.0, head_scale=1 / 4)


def on_gpu(reference: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    return LoadedModel(copy.deepcopy(reference.model).to(CUDA, dtype), reference.info)


def engine_of(reference: LoadedModel, dtype: torch.dtype, **options: Any) -> Engine:
    options = {"rank": 0, "num_kv_blocks": 256, "max_num_seqs": 32, "burst_steps": 8, **options}
    return Engine(on_gpu(reference, dtype), device=CUDA, **options)


def load_of(rng: random.Random) -> list[GenerateRequest]:
    shared = prompt_of(80, 99)
    return [
        request(
            f"load{i}",
            [*shared[: rng.randrange(80)], *prompt_of(rng.randint(1, 60), i)],
            n=rng.choice([1, 2, 6]),
            seed=i,
            max_tokens=rng.randint(1, 90),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
        )
        for i in range(12)
    ]


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_are_those_of_float32_on_the_cpu(
    reference: LoadedModel, dtype: torch.dtype, block_size: int
) -> None:
    """Prefill in chunks, then decode; 256 is where FlashAttention may be chosen."""
    engine = engine_of(reference, dtype, block_size=block_size, max_batch_tokens=50)
    prompt = prompt_of(120)
    result = run_all(
        engine,
        request("r", prompt, max_tokens=100, temperature=0.0, logprobs=0, prompt_logprobs=True),
    )
    tokens = prompt + result.tokens["r", 0]
    logits = reference.model(torch.tensor([tokens]), CausalAttend())[0, :, :VOCAB_SIZE]
    expected = logits.log_softmax(-1)
    entries = [*result.scores["r", 0], *result.logprobs["r", 0]]
    for position, entry in enumerate(entries, start=1):
        wanted = float(expected[position - 1, tokens[position]])
        assert entry.logprob == pytest.approx(wanted, abs=TOLERANCE[dtype])
    assert len(entries) == len(tokens) - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_attention(dtype: torch.dtype) -> None:
    rng = random.Random(4)
    lengths = [50, 1, 33]
    texts = [Text.random(n, 2, 64, dtype, i) for i, n in enumerate(lengths)]
    steps = chunked(lengths, rng, 30)
    nan = float("nan")
    answers = attend_all(TorchBackend(), texts, paged(lengths, rng), steps, device="cuda", fill=nan)
    assert_is_attention(answers, texts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_recorded_step_gives_the_bits_of_a_plain_one(
    reference: LoadedModel, dtype: torch.dtype, deterministic: bool
) -> None:
    """The same kernels on the same shapes."""
    prompt = prompt_of(40)
    tokens = []
    for recorded in (True, False):
        engine = engine_of(reference, dtype, burst_steps=4, deterministic=deterministic)
        if not recorded:
            decoder = engine._runner.decoder(max_rows=32, max_steps=4, recorded=False)
            engine._bursts._decoder = decoder
        load = [request("r", prompt, n=n, max_tokens=60, seed=n) for n in (1, 3, 20)]
        tokens.append([run_all(engine, each).tokens for each in load])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_is_the_same_to_the_bit_whatever_else_runs(
    reference: LoadedModel, dtype: torch.dtype
) -> None:
    """Alone or under load, in bursts or single steps, prefilled in any chunks, preempted or not."""
    subject = request("subject", prompt_of(70, 5), seed=77, max_tokens=100, logprobs=3)
    drawn = request("drawn", prompt_of(70, 6), n=3, seed=78, max_tokens=100)
    alone = run_all(engine_of(reference, dtype, deterministic=True), subject, drawn)
    preemptions = 0
    for seed, options in enumerate(
        ({}, {"burst_steps": 0}, {"num_kv_blocks": 24, "max_batch_tokens": 37}, {"burst_steps": 3})
    ):
        requests = load_of(random.Random(seed))
        requests.insert(seed * 3, subject)
        requests.append(drawn)
        engine = engine_of(reference, dtype, deterministic=True, **options)
        busy = run_all(engine, *requests)
        for key in [("subject", 0), ("drawn", 0), ("drawn", 1), ("drawn", 2)]:
            assert busy.tokens[key] == alone.tokens[key], (key, options)
        assert busy.logprobs["subject", 0] == alone.logprobs["subject", 0], options
        preemptions += engine.stats().preemptions
    assert preemptions > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(768, 2304), (768, 3072), (3072, 768), (1600, 6400)])
def test_products_of_a_fixed_number_of_rows_do_not_depend_on_the_batch(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    tiled = TiledLinear(nn.Linear(*shape, device=CUDA, dtype=dtype))
    assert linear.rows_are_independent(tiled)


def test_arrivals_and_aborts_in_the_middle_of_bursts(reference: LoadedModel) -> None:
    requests = load_of(random.Random(9))
    expected = run_all(engine_of(reference, torch.float32, deterministic=True), *requests).tokens
    engine, collector = engine_of(reference, torch.float32, deterministic=True), Collector()
    left = [*requests]
    for step in range(5000):
        if left and step % 3 == 0:
            engine.add(left.pop(0))
        if step == 20:
            engine.abort("load2")
        if not left and not engine.has_work:
            break
        collector.take(engine.step())
        engine.check_integrity()
    for key, tokens in expected.items():
        if key[0] != "load2":
            assert collector.tokens[key] == tokens
    assert engine.stats().free_blocks == engine.stats().total_blocks


@pytest.mark.parametrize("vocab_size", [65, 50257])
def test_sampling_is_by_the_cumulative_distribution(vocab_size: int) -> None:
    torch.manual_seed(1)
    rows = 64
    logits = torch.randn(rows, padded_width(vocab_size), device=CUDA) * 3
    uniforms = torch.rand(rows, dtype=torch.float64, device=CUDA)
    scale = torch.linspace(0.5, 2, rows, device=CUDA)
    scale[::7] = 0
    logits[5, 3] = torch.nan
    found = choose(logits.clone(), uniforms, scale, vocab_size)
    assert found[5] == -1
    real = logits[:, :vocab_size].double()
    cdf = torch.softmax(real * scale.double().unsqueeze(1), -1).cumsum(-1)
    for row in range(rows):
        token = int(found[row])
        if row == 5:
            continue
        if scale[row] == 0:
            assert token == int(real[row].argmax())
        else:
            below = float(cdf[row, token - 1]) if token else 0.0
            assert below - 1e-5 <= float(uniforms[row]) <= float(cdf[row, token]) + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(8, 768, device=CUDA, dtype=dtype)
    weight = torch.randn(512, 768, device=CUDA, dtype=dtype)
    logits = Head(weight)(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0, atol=1e-3)


def test_memory_is_planned_so_that_the_largest_step_fits(reference: LoadedModel) -> None:
    loaded: Any = on_gpu(reference, torch.float16)
    limits = memory.Limits(64, 2048, 16, deterministic=False)
    before = torch.cuda.memory_allocated()
    needs = memory.measure(loaded, limits, CUDA)
    assert needs.step > 0
    assert needs.graphs > 0
    free, _ = torch.cuda.mem_get_info()
    assert 0 < memory.kv_budget([loaded], limits, CUDA) < free
    runner = ModelRunner(loaded, device=CUDA, num_kv_blocks=16, block_size=16)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    runner.run(memory.largest_batch(loaded, limits, 16))
    assert torch.cuda.max_memory_allocated() - start <= 1.1 * (needs.step + needs.kept)
    assert start >= before


def test_the_backend_by_block_size() -> None:
    """What this GPU gets, for the record: pytest -rP shows it."""
    capability = torch.cuda.get_device_capability(CUDA)
    for block_size in (16, 256):
        backend = select_backend(CUDA, torch.float16, block_size)
        print(torch.cuda.get_device_name(CUDA), capability, block_size, backend.name)
        assert backend.name in ("triton", "varlen")
    assert not varlen.fits(CUDA, torch.float16, 16, 64)
