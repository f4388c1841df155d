"""past_context: nanoGPT's sliding crop against its definition, and stopping with the context."""

import random
from typing import Any

import msgspec
import pytest
import torch

from nanogpt.api.plan import make_plan
from nanogpt.api.protocol import MAX_CONTEXTS, parse_completion
from nanogpt.engine.attention import select_backend
from nanogpt.engine.decode import choose
from nanogpt.engine.engine import Engine
from nanogpt.engine.logit_rules import _counts
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.uniforms import uniforms
from nanogpt.errors import ContextLengthExceeded, InvalidRequest
from nanogpt.model.gpt import GPT, CausalAttend
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest
from tests.engine_utils import (
    VOCAB_SIZE,
    Collector,
    fake_engine,
    fake_output,
    fake_token,
    prompt_of,
    request,
    run_all,
    tiny_gpt,
)
from tests.fake_cluster import INFO, ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 32


@pytest.fixture
def loaded() -> LoadedModel:
    """Fresh for each test, since an engine packs it: a token depends on all of its context."""
    return tiny_gpt(CONTEXT, vocab_rows=VOCAB_SIZE)


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    options = {"rank": 0, "num_kv_blocks": 64, "block_size": 4, "max_num_seqs": 32, **options}
    return Engine(loaded, device="cpu", **options)


@torch.inference_mode()
def generate(model: GPT, req: GenerateRequest, index: int) -> list[int]:
    """nanoGPT's generate(): the last block_size tokens, all of them anew for each token. A uniform
    is used as the sampler's definition has it."""
    prompt_i, choice_j = divmod(index, req.n)
    tokens, p = [*req.prompts[prompt_i]], req.params
    stream = uniforms(p.seed, prompt_i, choice_j, p.max_tokens)
    scale = torch.tensor([0.0 if p.temperature == 0 else 1 / p.temperature])
    for uniform in stream:
        idx_cond = torch.tensor([tokens[-model.config.block_size :]])
        logits = model(idx_cond, CausalAttend())[:, -1, :]
        drawn = choose(logits, torch.tensor([uniform]), scale, VOCAB_SIZE)
        tokens.append(int(drawn))
    return tokens[len(req.prompts[prompt_i]) :]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("length", [1, 20, CONTEXT - 1, CONTEXT, CONTEXT + 1, 100])
def test_equals_the_plain_definition(loaded: LoadedModel, temperature: float, length: int) -> None:
    req = request(
        "r", prompt_of(length), n=2, max_tokens=90, temperature=temperature, crop=True, seed=length
    )
    expected = [generate(loaded.model, req, index) for index in range(2)]
    result = run_all(engine_of(loaded, max_batch_tokens=50), req)
    assert [result.tokens["r", index] for index in range(2)] == expected
    assert set(result.finish_reasons.values()) == {"length"}
    assert len(set(expected[0][CONTEXT:])) > 5, "a network that repeats itself would prove little"


def fake_cropped(req: GenerateRequest, index: int, context_length: int) -> list[int]:
    """The plain definition, of the fake runner's tokens."""
    prompt_i, choice_j = divmod(index, req.n)
    tokens = [*req.prompts[prompt_i]]
    for uniform in uniforms(req.params.seed, prompt_i, choice_j, req.params.max_tokens):
        tokens.append(fake_token(tokens[-context_length:], uniform))
    return tokens[len(req.prompts[prompt_i]) :]


@pytest.mark.parametrize("seed", range(6))
def test_any_load_in_any_memory(seed: int) -> None:
    """Slots that a sequence reads hold what belongs there (the fake runner checks), whoever shares
    prompts, is preempted, or is recomputed; other requests don't notice."""
    rng, context = random.Random(seed), 16
    requests = [
        request(
            f"r{i}",
            [*prompt_of(rng.randint(1, 14), 99), *prompt_of(rng.randint(0, 2), i)],
            n=rng.choice([1, 1, 3]),
            seed=i,
            max_tokens=rng.choice([1, 5, 20, 50]),
            crop=rng.random() < 0.7,
            tenant=rng.choice(["a", "b"]),
            priority=rng.choice([0, 0, 1]),
        )
        for i in range(14)
    ]
    engine = fake_engine(
        context_length=context,
        num_kv_blocks=rng.choice([4, 7, 20]),
        max_batch_tokens=rng.choice([16, 19, 64]),
    )
    result = run_all(engine, *requests, max_steps=20_000)
    assert not result.failed
    for req in requests:
        for index in range(req.n):
            made = fake_cropped if req.params.crop else fake_output
            assert result.tokens[req.request_id, index] == made(req, index, context)


def test_windows_stay_out_of_the_prefix_cache() -> None:
    """What slid out is of no use to others, and must not evict what is."""
    engine = fake_engine(context_length=16, num_kv_blocks=12)
    prompt = prompt_of(12)
    run_all(engine, request("first", prompt, max_tokens=1))
    run_all(engine, request("long", prompt_of(10, 5), max_tokens=60, crop=True))
    again = run_all(engine, request("again", prompt, max_tokens=1))
    assert again.cached["again", 0] == 8


def test_work_counts_for_fairness() -> None:
    """A token past the context costs a context: its tenant is served less often for it."""
    engine = fake_engine(context_length=16, max_batch_tokens=16, max_num_seqs=8)
    engine.add(request("dear", prompt_of(16), max_tokens=100, crop=True, tenant="a"))
    collector = Collector()
    for _ in range(12):
        collector.take(engine.step())
    (flow,) = {seq.flow for seq in engine._scheduler.running}
    produced = len(collector.tokens["dear", 0])
    assert flow.service >= (produced - 1) * 16


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"presence_penalty": 0.7}])
def test_the_same_alone_and_under_load(loaded: LoadedModel, params: dict[str, Any]) -> None:
    subject = request(
        "s", prompt_of(20, 5), seed=77, max_tokens=60, crop=True, logprobs=5, **params
    )
    others = [
        request(f"o{i}", prompt_of(5 + i, i), n=2, max_tokens=10 * i, seed=i, crop=i % 2 == 0)
        for i in range(1, 6)
    ]
    alone = run_all(engine_of(loaded), subject)
    busy = run_all(
        engine_of(loaded, num_kv_blocks=20, max_batch_tokens=35), *others[:2], subject, *others[2:]
    )
    assert busy.tokens["s", 0] == alone.tokens["s", 0]
    if select_backend(torch.device("cpu"), torch.float32, 4).name == "cpu":
        assert busy.logprobs["s", 0] == alone.logprobs["s", 0]


def test_a_restart_changes_nothing(loaded: LoadedModel) -> None:
    """Before and after sliding; penalties look at all of the output, also what has slid out."""
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    fields: dict[str, Any] = {"n": 2, "max_tokens": 70, "seed": 3, "crop": True, **penalties}
    whole = run_all(engine_of(loaded), request("r", prompt_of(20), **fields)).tokens
    for steps in (1, 12, 14, 40, 69):
        first, collector = engine_of(loaded), Collector()
        first.add(request("r", prompt_of(20), **fields))
        for _ in range(steps):
            collector.take(first.step())
        so_far = tuple(tuple(collector.tokens.get(("r", i), ())) for i in range(2))
        again = request("r", prompt_of(20), resumed=so_far, **fields)
        assert run_all(engine_of(loaded), again).tokens == whole


def test_counts_remember_what_slid_out() -> None:
    req = request("r", [1, 2, 3], crop=True, max_tokens=50, repetition_penalty=2.0, resumed=((4,),))
    seq = Sequence(req, 0, arrival=0, context_length=4)
    for token in (5, 5, 6, 7, 8, 9):
        seq.append(token)
        seq.slide()
    assert (seq.tokens, seq.dropped, seq.output_len) == ([6, 7, 8, 9], [1, 2, 3, 4, 5, 5], 7)
    counts = _counts(seq)
    found = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    assert found == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2, 6: 1, 7: 1, 8: 1, 9: 1}


def test_without_it_a_choice_ends_with_the_context() -> None:
    result = run_all(fake_engine(context_length=16), request("r", prompt_of(10), max_tokens=50))
    assert len(result.tokens["r", 0]) == 6
    assert result.finish_reasons["r", 0] == "length"


class TestPlan:
    """The context of the fake model has 64 tokens, each of them a byte."""

    def plan(self, **fields: Any):
        body = msgspec.json.encode({"model": INFO.name, "prompt": "x" * 10, **fields})
        request = parse_completion(body, "application/json")
        return make_plan(request, INFO, ByteTokenizer())

    def test_stop_means_the_end_of_the_context(self):
        params = self.plan(max_tokens=10**9, past_context="stop").request.params
        assert (params.max_tokens, params.crop) == (54, False)
        two = self.plan(prompt=["x" * 60, "x" * 30], max_tokens=50, past_context="stop")
        assert two.request.params.max_tokens == 34
        assert self.plan(prompt="x" * 64, past_context="stop").request.params.max_tokens == 0

    def test_crop_takes_several_contexts(self):
        most = 64 * MAX_CONTEXTS
        plan = self.plan(max_tokens=most - 10, past_context="crop")
        assert (plan.request.params.max_tokens, plan.request.params.crop) == (most - 10, True)
        plan = self.plan(prompt="x" * (most - 1), max_tokens=1, past_context="crop")
        assert plan.prompt_tokens == most - 1
        plan = self.plan(prompt=[1] * (most - 1), max_tokens=1, past_context="crop")
        assert plan.prompt_tokens == most - 1

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"max_tokens": 55}, "max_tokens"),
            ({"prompt": "x" * 65, "past_context": "stop"}, "prompt"),
            ({"prompt": [1] * 65, "past_context": "stop"}, "prompt"),
            ({"max_tokens": 64 * MAX_CONTEXTS - 9, "past_context": "crop"}, "max_tokens"),
            ({"prompt": "x" * (64 * MAX_CONTEXTS + 1), "past_context": "crop"}, "prompt"),
            ({"prompt": "x" * 65, "past_context": "crop", "echo": True, "logprobs": 1}, "prompt"),
        ],
    )
    def test_what_does_not_fit(self, fields, param):
        with pytest.raises(ContextLengthExceeded) as refused:
            self.plan(**fields)
        assert refused.value.param == param

    def test_other_words(self):
        with pytest.raises(InvalidRequest, match="past_context") as refused:
            self.plan(past_context="slide")
        assert refused.value.param == "past_context"


def test_over_http(client):
    """Past the bundled model's 256 tokens: text of a stream, stop strings, and usage agree."""
    fields: dict[str, Any] = {"model": "shakespeare-char", "prompt": "ROMEO:", "seed": 4}
    fields |= {"max_tokens": 290, "n": 2, "extra_body": {"past_context": "crop"}}
    whole = client.completions.create(**fields)
    assert whole.usage.completion_tokens == 580
    assert [c.finish_reason for c in whole.choices] == ["length", "length"]
    texts = ["", ""]
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    stop = texts[0][265:275]
    stopped = client.completions.create(**fields, stop=stop).choices[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", texts[0].partition(stop)[0])
    ended = client.completions.create(**fields | {"extra_body": {"past_context": "stop"}})
    assert [c.text for c in ended.choices] == [text[:250] for text in texts]
