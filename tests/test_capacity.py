"""The arithmetic of memory, against what is really allocated."""

import json

import pytest
import torch

from nanogpt.bench.__main__ import main
from nanogpt.engine.attention import TorchBackend
from nanogpt.engine.capacity import capacity
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.registry import ModelCard, read_cards

GIB = 2**30
CARDS = read_cards()
GPT2 = [name for name in CARDS if name.startswith("gpt2")]


def config_of(card: ModelCard) -> GPTConfig:
    shape = card.shape
    return GPTConfig(
        block_size=card.context,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        bias=shape.bias,
    )


@pytest.mark.parametrize("name", CARDS)
def test_cards_have_the_parameters_of_their_shapes(name: str) -> None:
    with torch.device("meta"):
        assert GPT(config_of(CARDS[name])).num_parameters() == CARDS[name].parameters


@pytest.mark.parametrize("name", GPT2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_per_token_are_those_of_a_cache(name: str, dtype: torch.dtype) -> None:
    card = CARDS[name]
    caches = TorchBackend().empty_cache(config_of(card), 3, 16, dtype, torch.device("meta"))
    found = capacity(card, memory=GIB, item_bytes=dtype.itemsize)
    assert found.per_token * 3 * 16 == sum(cache.nbytes for cache in caches)


def test_what_a_t4_holds() -> None:
    """16 GB; by hand: (16e9 - 2 * 1,557,611,200) * 0.85 / 307,200 / 16 = 2,228 blocks."""
    xl = capacity(CARDS["gpt2-xl"], memory=16 * 10**9)
    assert xl.per_token == 307_200
    assert xl.contexts == 2228 // 64
    assert xl.tokens == 2228 * 16
    assert xl.kv + xl.weights < 16 * 10**9
    small = capacity(CARDS["gpt2"], memory=16 * 10**9)
    assert small.per_token == 36_864
    assert small.contexts == 354


def test_weights_that_do_not_fit_leave_no_context() -> None:
    none = capacity(CARDS["gpt2-xl"], memory=3 * 10**9)
    assert (none.kv, none.contexts, none.tokens) == (0, 0, 0)


def test_the_bench_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", "gpt2,gpt2-xl", "--memory", "16", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["benchmark"] == "memory"
    assert result["settings"]["dtype"] == "float32"
    want = {name: capacity(CARDS[name], memory=16 * 10**9, item_bytes=4) for name in ["gpt2"]}
    assert result["results"]["gpt2"] == want["gpt2"]._asdict()
    assert f"{want['gpt2'].contexts}" in out[2].split()
