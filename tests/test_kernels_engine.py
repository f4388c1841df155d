"""The engine over weights in every type: load, chunks and preemption don't change a bit."""

import random

import pytest
import torch

from nanogpt.config import ServeConfig
from nanogpt.engine import setup
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.engine import Engine
from nanogpt.errors import StartupError
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest
from tests.engine_utils import VOCAB_SIZE, model_info, request, run_all
from tests.small_gpt import small_gpt

pytestmark = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
TYPES = ["float32", "bfloat16", "float16", "int8"]


def engine_of(dtype: str, **options: int) -> Engine:
    stored = getattr(torch, "float32" if dtype == "int8" else dtype)
    model = small_gpt(stored)
    # A tied head would make most networks repeat the last token for ever.
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    model.lm_head.weight = torch.nn.Parameter(head.to(stored))
    info = model_info(128)
    info = type(info)(**{f: getattr(info, f) for f in info.__struct_fields__} | {"dtype": dtype})
    options = {"num_kv_blocks": 128, "max_num_seqs": 32, **options}
    return Engine(LoadedModel(model, info), rank=0, device=torch.device("cpu"), **options)


def load_of(rng: random.Random) -> list[GenerateRequest]:
    return [
        request(
            f"load{i}",
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))],
            n=rng.choice([1, 2, 6]),
            seed=i,
            max_tokens=rng.randint(1, 50),
        )
        for i in range(10)
    ]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_choice_is_the_same_alone_and_under_load(dtype: str) -> None:
    prompt = [random.Random(5).randrange(VOCAB_SIZE) for _ in range(50)]
    subject = request("subject", prompt, seed=77, max_tokens=60, logprobs=5)
    alone = run_all(engine_of(dtype), subject)
    # Few blocks, so that some are preempted; a small budget, so that prompts are cut anywhere.
    engine = engine_of(dtype, num_kv_blocks=18, max_batch_tokens=37)
    requests = load_of(random.Random(0))
    busy = run_all(engine, *requests[:4], subject, *requests[4:])
    assert engine.stats().preemptions > 0
    assert busy.tokens["subject", 0] == alone.tokens["subject", 0]
    assert busy.logprobs["subject", 0] == alone.logprobs["subject", 0]


def test_int8_is_another_network() -> None:
    prompt = [1, 2, 3, 4]
    subject = request("subject", prompt, temperature=0.0, max_tokens=5, logprobs=1)
    exact, rounded = (run_all(engine_of(d), subject).logprobs for d in ("float32", "int8"))
    assert exact["subject", 0] != rounded["subject", 0]


def test_int8_needs_a_cpu_and_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = ServeConfig(dtype="int8"), torch.device("cpu")
    assert not isinstance(setup.choose_dtype(config, cpu), torch.dtype)  # by what the file has
    with pytest.raises(StartupError, match="int8 is for CPUs"):
        setup.choose_dtype(config, torch.device("cuda"))
    monkeypatch.setattr(setup, "load_kernels", lambda: False)
    with pytest.raises(StartupError, match=r"nanogpt\.engine\.cpu\.build says why"):
        setup.choose_dtype(config, cpu)
