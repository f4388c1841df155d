"""Tokens of a request that nobody reads one by one come in few events, and are the same."""

import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanogpt.engine.engine import Engine
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest, TokenEvent
from tests.engine_utils import Collector, prompt_of, request, run_all, tiny_gpt

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 96


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_gpt(CONTEXT, eos_token_id=3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still unless `tick` moves it, once a step."""
    clock = SimpleNamespace(now=1000.0, tick=lambda: 0.0)

    def monotonic() -> float:
        clock.now += clock.tick()
        return clock.now

    monkeypatch.setattr("nanogpt.engine.engine.time", SimpleNamespace(monotonic=monotonic))
    return clock


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    options = {"rank": 0, "num_kv_blocks": 64, "max_num_seqs": 32, **options}
    return Engine(loaded, device="cpu", **options)


def gathered(each: GenerateRequest, seconds: float) -> GenerateRequest:
    return msgspec.structs.replace(each, gather_s=seconds)


def events_of(engine: Engine, each: GenerateRequest) -> list[TokenEvent]:
    engine.add(each)
    events: list[TokenEvent] = []
    while engine.has_work:
        events += [event for event in engine.step() if isinstance(event, TokenEvent)]
    return events


def test_the_first_token_and_the_end_are_told_at_once_the_rest_together(loaded, clock) -> None:
    each = gathered(request("r", prompt_of(9), max_tokens=30, ignore_eos=True), 0.5)
    first, last = events_of(engine_of(loaded), each)
    assert (first.position, len(first.token_ids), first.finish_reason) == (0, 1, None)
    assert (last.position, len(last.token_ids), last.finish_reason) == (1, 29, "length")


def test_what_was_kept_back_is_told_when_its_time_is_up(loaded, clock) -> None:
    clock.tick = lambda: 0.125  # a step
    each = gathered(request("r", prompt_of(9), max_tokens=30, ignore_eos=True), 0.5)
    events = events_of(engine_of(loaded), each)
    assert {len(event.token_ids) for event in events[2:-1]} == {4}
    assert sum(len(event.token_ids) for event in events) == 30


def test_all_choices_of_a_step_are_told_together(loaded, clock) -> None:
    clock.tick = lambda: 0.1
    engine = engine_of(loaded)
    for i in range(5):
        params = {"max_tokens": 40, "ignore_eos": True, "seed": i}
        engine.add(gathered(request(f"r{i}", prompt_of(8, i), **params), 0.8))
    told = []
    for _ in range(30):
        told.append(sum(isinstance(event, TokenEvent) for event in engine.step()))
    assert set(told[8:]) == {0, 5}


def test_log_probabilities_are_not_kept_back(loaded, clock) -> None:
    """A message with those of many choices would be too large."""
    params = {"max_tokens": 20, "logprobs": 2, "ignore_eos": True}
    events = events_of(engine_of(loaded), gathered(request("r", prompt_of(9), **params), 0.5))
    assert [len(event.logprobs) for event in events] == [1] * 20


def load_of(rng: random.Random) -> list[GenerateRequest]:
    found = []
    for i in range(10):
        resumed: tuple[tuple[int, ...], ...] = ()
        n = rng.choice([1, 1, 3])
        if n == 1 and rng.random() < 0.3:
            resumed = (tuple(rng.randrange(4, 60) for _ in range(rng.randint(1, 6))),)
        found.append(
            request(
                f"load{i}",
                prompt_of(rng.randint(1, 40), i),
                n=n,
                resumed=resumed,
                seed=i,
                max_tokens=rng.randint(7, 50),
                temperature=rng.choice([0.0, 0.7, 1.0]),
                presence_penalty=rng.choice([0.0, 0.5]),
                logprobs=rng.choice([None, None, 2]),
                crop=rng.random() < 0.3,
            )
        )
    return found


@pytest.mark.parametrize("blocks", [16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_requests_gets_the_same_tokens(loaded, clock, seed: int, blocks: int) -> None:
    """With 16 blocks choices are preempted, with what they have kept back."""
    rng = random.Random(seed)
    clock.tick = lambda: rng.choice([0.0, 0.01, 0.3])
    requests = load_of(rng)
    options = {"num_kv_blocks": blocks, "block_size": 8}
    expected = run_all(engine_of(loaded, **options), *requests)
    slow = [gathered(each, rng.choice([0.0, 0.05, 1.0])) for each in requests]
    engine = engine_of(loaded, **options)
    found = run_all(engine, *slow)
    assert engine.stats().preemptions or blocks == 64
    for part in ("tokens", "logprobs", "finish_reasons", "cached"):
        assert getattr(found, part) == getattr(expected, part)


def test_nothing_comes_of_what_a_cancelled_choice_has_kept_back(loaded, clock) -> None:
    each = gathered(request("r", prompt_of(9), n=2, max_tokens=30, ignore_eos=True), 0.5)
    engine = engine_of(loaded)
    engine.add(each)
    collector = Collector()
    for _ in range(6):
        collector.take(engine.step())
    engine.abort("r", 0)
    while engine.has_work:
        collector.take(engine.step())
    assert [len(collector.tokens["r", i]) for i in range(2)] == [1, 30]
