"""The arithmetic of memory, against what is really allocated."""

import pytest
import torch

from nanogpt import registry
from nanogpt.engine.attention import TorchBackend
from nanogpt.engine.capacity import GPT2_SHAPES, capacity
from nanogpt.model.gpt import GPT

GIB = 2**30


@pytest.mark.parametrize("name", GPT2_SHAPES)
def test_shapes_have_the_parameters_of_the_cards(name: str) -> None:
    with torch.device("meta"):
        assert GPT(GPT2_SHAPES[name]).num_parameters() == registry.read_cards()[name].parameters


@pytest.mark.parametrize("name", GPT2_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_per_token_are_those_of_a_cache(name: str, dtype: torch.dtype) -> None:
    config = GPT2_SHAPES[name]
    caches = TorchBackend().empty_cache(config, 3, 16, dtype, torch.device("meta"))
    found = capacity(config, 1, memory=GIB, dtype=dtype)
    assert found.per_token * 3 * 16 == sum(cache.nbytes for cache in caches)


def test_what_a_t4_holds() -> None:
    """16 GB; by hand: (16e9 - 2 * 1,557,611,200) * 0.85 / 307,200 / 16 = 2,228 blocks."""
    xl = capacity(GPT2_SHAPES["gpt2-xl"], 1_557_611_200, memory=16 * 10**9)
    assert xl.per_token == 307_200
    assert xl.contexts == 2228 // 64
    assert xl.tokens == 2228 * 16
    assert xl.kv + xl.weights < 16 * 10**9
    small = capacity(GPT2_SHAPES["gpt2"], 124_439_808, memory=16 * 10**9)
    assert small.per_token == 36_864
    assert small.contexts == 354


def test_weights_that_do_not_fit_leave_no_context() -> None:
    none = capacity(GPT2_SHAPES["gpt2-xl"], 1_557_611_200, memory=3 * 10**9)
    assert (none.kv, none.contexts, none.tokens) == (0, 0, 0)
