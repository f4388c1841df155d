"""Our network and engine against transformers': real shapes, full depth and width, float32."""

import shutil

import msgspec
import pytest
import torch

from nanogpt.engine.engine import Engine
from nanogpt.engine.kv_cache import blocks_per_context
from nanogpt.model.gpt import CausalAttend
from nanogpt.model.load import load_model
from tests.engine_utils import request as engine_request
from tests.engine_utils import run_all
from tests.hf_models import SIZES, write_model

TOLERANCE = 1e-4  # of logits, absolute
STEPS = 64
LARGE = ("gpt2-large", "gpt2-xl")


@pytest.fixture(
    scope="module",
    params=[pytest.param(s, marks=pytest.mark.large if s in LARGE else ()) for s in SIZES],
)
def pair(request, tmp_path_factory):
    """transformers' model and ours, from the directory that it wrote; one size at a time."""
    size = request.param
    directory = tmp_path_factory.mktemp(size)
    theirs = write_model(directory, seed=len(size), **SIZES[size])
    ours = load_model(str(directory), size, dtype=torch.float32, device="cpu")
    yield theirs, ours
    shutil.rmtree(directory)


only_gpt2 = pytest.mark.parametrize(  # in the normal run
    "pair",
    [pytest.param(s, marks=pytest.mark.large if s != "gpt2" else ()) for s in SIZES],
    indirect=True,
)


def prompts(count, length, seed=0):
    return torch.randint(50257, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_same_logits(pair):
    theirs, ours = pair
    ids = prompts(2, 96)
    expected = theirs(ids).logits
    assert expected.std() > 0.5, "logits that hardly differ would show nothing"
    assert (ours.model(ids, CausalAttend()) - expected).abs().max() < TOLERANCE


@torch.inference_mode()
@only_gpt2
def test_same_logits_at_the_last_position(pair):
    """All 1024 positions: the hidden states, and the logits of the last one."""
    theirs, ours = pair
    ids = prompts(1, 1024)
    expected = theirs(ids, logits_to_keep=1).logits[:, -1]
    hidden = ours.model.hidden(ids, torch.arange(1024), CausalAttend())
    assert (ours.model.lm_head(hidden[:, -1]) - expected).abs().max() < TOLERANCE


@torch.inference_mode()
@only_gpt2
def test_same_greedy_tokens_through_the_cache(pair):
    theirs, ours = pair
    ids = prompts(2, 21, seed=1)
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=50256,
    )[:, 21:].tolist()
    blocks = 2 * blocks_per_context(1024, 16)
    engine = Engine(ours, rank=0, device="cpu", num_kv_blocks=blocks)
    greedy = engine_request("r", *ids.tolist(), temperature=0.0, max_tokens=STEPS, min_tokens=STEPS)
    done = run_all(engine, msgspec.structs.replace(greedy, model=ours.info.name))
    assert min(len(set(tokens)) for tokens in expected) > STEPS // 4, "it says always the same"
    assert [done.tokens["r", i] for i in range(2)] == expected
