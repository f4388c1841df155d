"""The engine with a tiny network: what is cached, shared or batched must not show in answers."""

import random
from typing import Any

import pytest
import torch

from nanogpt.engine.attention import select_backend
from nanogpt.engine.engine import Engine
from nanogpt.engine.kv_cache import blocks_per_context
from nanogpt.errors import EngineError
from nanogpt.model.gpt import CausalAttend
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest, PromptScored, RequestFailed, TokenEvent
from tests.engine_utils import VOCAB_SIZE, Collector, prompt_of, request, run_all, tiny_gpt

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 128


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_gpt(CONTEXT)


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    options = {"rank": 0, "num_kv_blocks": 128, "max_num_seqs": 32, **options}
    return Engine(loaded, device="cpu", **options)


def has_row_invariant_kernels() -> bool:
    """The C++ kernels are built; without them rows are equal to rounding only."""
    return select_backend(torch.device("cpu"), torch.float32, 16).name == "cpu"


def full_logits(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Logits (T, VOCAB_SIZE) without a cache."""
    with torch.inference_mode():
        return loaded.model(torch.tensor([tokens]), CausalAttend())[0, :, :VOCAB_SIZE]


@pytest.mark.parametrize("budget", [32, 1024])
def test_cached_decoding_equals_the_full_forward_pass(loaded: LoadedModel, budget: int) -> None:
    tokens = prompt_of(60)
    result = run_all(
        engine_of(loaded, max_batch_tokens=budget),
        request("r", tokens, max_tokens=64, temperature=0.0, logprobs=5),
    )
    for token_id, entry in zip(result.tokens["r", 0], result.logprobs["r", 0], strict=True):
        expected = full_logits(loaded, tokens)[-1].log_softmax(-1)
        assert token_id == int(expected.argmax())
        values, ids = expected.topk(5)
        assert entry.top_ids == tuple(ids.tolist())
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-4)
        tokens.append(token_id)
    assert len(set(tokens[60:])) > 5, "a network that repeats itself would prove little"


def load_of(rng: random.Random) -> list[GenerateRequest]:
    shared = prompt_of(40, 99)
    return [
        request(
            f"load{i}",
            [*shared[: rng.randrange(40)], *prompt_of(rng.randint(1, 30), i)],
            n=rng.choice([1, 2, 6]),
            seed=i,
            max_tokens=rng.randint(1, 50),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            presence_penalty=rng.choice([0.0, 0.5]),
            logprobs=rng.choice([None, 2]),
        )
        for i in range(12)
    ]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_p": 0.8}])
def test_a_choice_is_the_same_alone_and_under_load(
    loaded: LoadedModel, params: dict[str, Any]
) -> None:
    subject = request("subject", prompt_of(50, 5), seed=77, max_tokens=60, logprobs=5, **params)
    alone = run_all(engine_of(loaded), subject)
    preemptions = 0
    for seed in range(3):
        requests = load_of(random.Random(seed))
        requests.insert(seed * 4, subject)
        # Few blocks, so that some are preempted; a small budget, so that prompts are cut anywhere.
        engine = engine_of(loaded, num_kv_blocks=18, max_batch_tokens=37)
        busy = run_all(engine, *requests)
        preemptions += engine.stats().preemptions
        assert busy.tokens["subject", 0] == alone.tokens["subject", 0]
        if has_row_invariant_kernels():
            assert busy.logprobs["subject", 0] == alone.logprobs["subject", 0]
    assert preemptions > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_choices_do_not_depend_on_how_ranks_share_them(loaded: LoadedModel, ranks: int) -> None:
    prompts = [prompt_of(20, 1), prompt_of(9, 2)]
    whole = run_all(engine_of(loaded), request("r", *prompts, n=8, max_tokens=20)).tokens
    owners = tuple(index % ranks for index in range(16))
    parts: dict[tuple[str, int], list[int]] = {}
    for rank in range(ranks):
        part = run_all(
            engine_of(loaded, rank=rank),
            request("r", *prompts, n=8, max_tokens=20, owners=owners),
        ).tokens
        assert not parts.keys() & part.keys()
        parts |= part
    assert parts == whole
    assert len({tuple(tokens) for tokens in whole.values()}) > 8


def test_a_restart_changes_nothing(loaded: LoadedModel) -> None:
    """Stop after any number of steps, hand prompt and tokens so far to a new engine, go on."""
    req = request("r", prompt_of(30), n=3, max_tokens=20, presence_penalty=0.4, seed=3)
    whole = run_all(engine_of(loaded), req).tokens
    for steps in (0, 1, 7, 19):
        first, collector = engine_of(loaded), Collector()
        first.add(req)
        for _ in range(steps):
            collector.take(first.step())
        so_far = tuple(tuple(collector.tokens.get(("r", i), ())) for i in range(3))
        again = request(
            "r", prompt_of(30), n=3, max_tokens=20, presence_penalty=0.4, seed=3, resumed=so_far
        )
        assert run_all(engine_of(loaded), again).tokens == whole


@pytest.mark.parametrize("length", [2, 3, 64, 65, 66, 128])
def test_prompt_scores_equal_the_full_forward_pass(loaded: LoadedModel, length: int) -> None:
    prompt = prompt_of(length)
    result = run_all(
        engine_of(loaded, max_batch_tokens=50),
        request("r", prompt, max_tokens=0, logprobs=4, prompt_logprobs=True),
    )
    expected = full_logits(loaded, prompt).log_softmax(-1)
    scores = result.scores["r", 0]
    assert len(scores) == length - 1
    for position, entry in enumerate(scores, start=1):
        row = expected[position - 1]
        assert entry.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
        values, ids = row.topk(4)
        assert entry.top_ids == tuple(ids.tolist())
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-4)
    assert result.finish_reasons["r", 0] == "length"


def test_the_token_that_ends_a_choice_has_its_log_probability(loaded: LoadedModel) -> None:
    """A scoring client counts on a value for every sampled token."""
    prompt = prompt_of(10)
    end = int(full_logits(loaded, prompt)[-1].argmax())
    engine = engine_of(loaded)
    for logprobs in (1, None):
        engine.add(request("r", prompt, temperature=0.0, stop_token_ids=(end,), logprobs=logprobs))
        (event,) = engine.step()
        assert isinstance(event, TokenEvent)
        assert event.token_ids == ()
        assert event.finish_reason == "stop"
        assert event.end_token_id == (end if logprobs else None)
        assert [entry.top_ids for entry in event.logprobs] == ([(end,)] if logprobs else [])


def test_a_network_that_fails_is_an_engine_error(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    engine = engine_of(loaded)
    monkeypatch.setattr(loaded.model, "hidden", broken)
    engine.add(request("r"))
    with pytest.raises(EngineError, match="out of memory"):
        engine.step()


def test_events_of_one_step(loaded: LoadedModel) -> None:
    """One token event for each running choice; scores first."""
    engine = engine_of(loaded)
    engine.add(request("a", prompt_of(5), n=3, max_tokens=2, prompt_logprobs=True))
    events = engine.step()
    assert isinstance(events[0], PromptScored)
    assert [(type(e), e.index, e.position) for e in events[1:]] == [
        (TokenEvent, i, 0) for i in range(3)
    ]
    assert [e.finish_reason for e in engine.step() if isinstance(e, TokenEvent)] == ["length"] * 3
    assert not engine.has_work
    assert engine.step() == []


def test_one_choice_does_not_wait_for_another_tenants_64(loaded: LoadedModel) -> None:
    engine, collector = engine_of(loaded, num_kv_blocks=96), Collector()
    many = request("many", prompt_of(20), n=64, max_tokens=80, tenant="a")
    one = request("one", prompt_of(20, 1), max_tokens=30, tenant="b")
    engine.add(many)
    for _ in range(5):
        collector.take(engine.step())
    engine.add(one)
    for _ in range(3):
        collector.take(engine.step())
    assert collector.tokens["one", 0]
    while ("one", 0) not in collector.finish_reasons:
        collector.take(engine.step())
    assert engine.stats().steps <= 5 + 3 + 30
    assert not any(request_id == "many" for request_id, _ in collector.finish_reasons)
    while engine.has_work:
        collector.take(engine.step())
    assert engine.stats().fair_preemptions > 0
    if has_row_invariant_kernels():
        for each in (many, one):
            alone = run_all(engine_of(loaded), each).tokens
            assert {key: collector.tokens[key] for key in alone} == alone


def test_a_duplicate_id_fails_both(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    engine.add(request("r"))
    engine.add(request("r"))
    (event,) = engine.step()
    assert isinstance(event, RequestFailed)
    assert not engine.has_work


def test_abort_all_and_warm_up_leave_an_idle_engine(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    engine.warm_up()
    engine.add(request("a", prompt_of(30), n=4, max_tokens=50))
    engine.add(request("b", max_tokens=0))
    engine.step()
    engine.abort_all()
    assert not engine.has_work
    assert engine.stats().free_blocks == engine.stats().total_blocks
    assert (engine.stats().waiting, engine.stats().running) == (0, 0)


def test_blocks_of_a_full_context() -> None:
    assert blocks_per_context(1008) == 63
    assert blocks_per_context(1009) == 64
