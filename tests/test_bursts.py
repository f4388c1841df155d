"""Bursts: several tokens between two looks of the host, the same ones that single steps give.

On a CPU a decoder's step is the plain function that a GPU records as a graph.
"""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from nanogpt.engine import model_runner
from nanogpt.engine.decode import Decoder, choose, power_buckets
from nanogpt.engine.engine import Engine
from nanogpt.engine.sampler import NO_TOKEN
from nanogpt.errors import EngineError
from nanogpt.model.load import LoadedModel
from nanogpt.request import GenerateRequest, TokenEvent
from tests.engine_utils import VOCAB_SIZE, Collector, prompt_of, request, run_all, tiny_gpt

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 128


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_gpt(CONTEXT, eos_token_id=3)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's sampler, which is the one that decoders have."""
    monkeypatch.setattr("nanogpt.engine.sampler.load_kernels", lambda: False)


class LateDecoder(Decoder):
    """Works as late as a device may: not before the host waits for it, but then in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.queue: list[Callable[[], None]] = []

    def start(self, *arrays: np.ndarray) -> None:
        assert not self.queue, "rows were changed under a burst"
        copies = [array.copy() for array in arrays]
        self.queue.append(lambda: Decoder.start(self, *copies))

    def run(self, *arrays: np.ndarray) -> Any:
        copies = [array.copy() for array in arrays]
        decoder, done = self, []
        self.queue.append(lambda: done.append(Decoder.run(self, *copies).wait()))

        class Late:
            def wait(self) -> np.ndarray:
                while not done:
                    decoder.queue.pop(0)()
                return done[0]

        return Late()


@pytest.fixture(params=[Decoder, LateDecoder])
def burst_of(
    request: pytest.FixtureRequest, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    monkeypatch.setattr(model_runner, "Decoder", request.param)
    return lambda **options: engine_of(loaded, **{"burst_steps": 8, **options})


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    options = {"rank": 0, "num_kv_blocks": 128, "max_num_seqs": 32, **options}
    return Engine(loaded, device="cpu", **options)


@pytest.fixture(scope="module")
def by_single_steps(loaded: LoadedModel) -> Callable[..., Collector]:
    """What requests get without bursts: computed once, however many tests ask."""
    known: dict[bytes, Collector] = {}

    def run(requests: list[GenerateRequest]) -> Collector:
        key = msgspec.json.encode(requests)
        if key not in known:
            known[key] = run_all(engine_of(loaded), *requests)
        return known[key]

    return run


def load_of(rng: random.Random, count: int = 12) -> list[GenerateRequest]:
    shared = prompt_of(40, 99)
    return [
        request(
            f"load{i}",
            [*shared[: rng.randrange(40)], *prompt_of(rng.randint(1, 30), i)],
            n=rng.choice([1, 2, 6]),
            seed=i,
            max_tokens=rng.choice([1, 2, *rng.choices(range(1, 70), k=4)]),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 1.0, 1.0, 0.9]),
            presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, None, None, 2]),
            ignore_eos=rng.choice([True, True, False]),
            stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 0, 2]))),
        )
        for i in range(count)
    ]


def run_with_arrivals(
    engine: Engine, requests: list[GenerateRequest], every: int, aborts: dict[int, str]
) -> Collector:
    """A request every few steps, and some of them aborted at a step."""
    collector, left = Collector(), [*requests]
    for step in range(5000):
        if left and step % every == 0:
            engine.add(left.pop(0))
        if step in aborts:
            engine.abort(aborts[step])
        if not left and not engine.has_work:
            return collector
        collector.take(engine.step())
        engine.check_integrity()
    raise AssertionError("not done after 5000 steps")


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"temperature": 0.6}])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_bursts_give_what_single_steps_give(
    burst_of: Callable[..., Engine],
    by_single_steps: Callable[..., Collector],
    params: dict[str, Any],
    steps: int,
) -> None:
    requests = [
        request("one", prompt_of(20), n=3, max_tokens=61, **params),
        request("two", prompt_of(9, 1), max_tokens=200, ignore_eos=True, **params),
        request("three", prompt_of(1, 2), n=2, max_tokens=1, **params),
    ]
    single = by_single_steps(requests)
    bursts = run_all(burst_of(burst_steps=steps), *requests)
    assert bursts.tokens == single.tokens
    assert bursts.finish_reasons == single.finish_reasons
    assert bursts.cached == single.cached
    assert {"stop", "length"} >= set(single.finish_reasons.values())


@pytest.mark.parametrize("seconds", [0.002, 3600.0])
def test_gathered_tokens_are_the_same(
    burst_of: Callable[..., Engine], by_single_steps: Callable[..., Collector], seconds: float
) -> None:
    requests = load_of(random.Random(5))
    expected = by_single_steps(requests)
    found = run_all(
        burst_of(), *(msgspec.structs.replace(each, gather_s=seconds) for each in requests)
    )
    assert found.tokens == expected.tokens
    assert found.finish_reasons == expected.finish_reasons


def test_arrivals_aborts_and_preemption_change_nothing(
    burst_of: Callable[..., Engine], by_single_steps: Callable[..., Collector]
) -> None:
    preemptions = 0
    for seed in range(4):
        requests = load_of(random.Random(seed))
        expected = by_single_steps(requests)
        for every, options in ((1, {"num_kv_blocks": 14}), (3, {"max_batch_tokens": 37}), (11, {})):
            engine = burst_of(**options)
            aborts = {7: "load0", 16: "load3", 29: "load7"}
            found = run_with_arrivals(engine, requests, every, aborts)
            assert found.tokens.keys() <= expected.tokens.keys()
            for key, tokens in expected.tokens.items():
                if key in found.finish_reasons:
                    assert found.tokens[key] == tokens
                    assert found.finish_reasons[key] == expected.finish_reasons[key]
                else:
                    assert key[0] in aborts.values()
                    so_far = found.tokens.get(key, [])
                    assert so_far == tokens[: len(so_far)]
            assert engine.stats().free_blocks == engine.stats().total_blocks
            preemptions += engine.stats().preemptions
    assert preemptions > 0


def test_a_burst_is_one_event_for_each_choice(loaded: LoadedModel) -> None:
    engine = engine_of(loaded, burst_steps=4, max_num_seqs=64, num_kv_blocks=256)
    engine.add(request("r", prompt_of(20), n=64, max_tokens=14, ignore_eos=True))
    sizes = []
    while engine.has_work:
        events = [event for event in engine.step() if isinstance(event, TokenEvent)]
        sizes.append({len(event.token_ids) for event in events})
    # The prompt's own token; a start without tokens; then the host is a burst behind the device.
    assert sizes == [{1}, set(), {4}, {4}, {4}, {1}]
    assert engine.stats().generated_tokens == 64 * 14
    assert engine.stats().steps == 14


def test_the_next_burst_is_under_way_before_the_last_is_looked_at(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Noting(LateDecoder):
        def run(self, *arrays: np.ndarray) -> Any:
            calls.append("run")
            late = super().run(*arrays)
            wait = late.wait
            late.wait = lambda: calls.append("wait") or wait()
            return late

    monkeypatch.setattr(model_runner, "Decoder", Noting)
    engine = engine_of(loaded, burst_steps=2)
    engine.add(request("r", prompt_of(20), max_tokens=9, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert calls == ["run", "run", "wait", "run", "wait"]
    engine.add(request("s", prompt_of(10), max_tokens=2))
    engine.step()
    assert calls[5:] == ["wait"]  # nothing blindly while somebody waits


def test_blocks_filled_in_a_burst_are_found_again(loaded: LoadedModel) -> None:
    engines = [engine_of(loaded), engine_of(loaded, burst_steps=8)]
    hits = []
    for engine in engines:
        first = run_all(engine, request("a", prompt_of(20), max_tokens=60, ignore_eos=True))
        prompt = prompt_of(20) + first.tokens["a", 0]
        second = run_all(engine, request("b", prompt, max_tokens=5, ignore_eos=True))
        hits.append((second.cached["b", 0], second.tokens["b", 0]))
    assert hits[0] == hits[1]
    assert hits[0][0] == 64


def test_tokens_after_a_stop_are_thrown_away(loaded: LoadedModel) -> None:
    plain = run_all(engine_of(loaded), request("r", prompt_of(20), max_tokens=40, ignore_eos=True))
    tokens = plain.tokens["r", 0]
    stop = next(token for token in tokens[5:] if token not in tokens[:5])
    at = tokens.index(stop)
    for steps in (2, 3, 7, 16):
        engine = engine_of(loaded, burst_steps=steps)
        stopping = request(
            "r", prompt_of(20), max_tokens=40, ignore_eos=True, stop_token_ids=(stop,)
        )
        result = run_all(engine, stopping)
        assert result.tokens["r", 0] == tokens[:at]
        assert result.finish_reasons["r", 0] == "stop"
        assert engine.stats().generated_tokens == at


def test_logits_that_are_not_finite_fail_their_request_only(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = request("good", prompt_of(20), max_tokens=20, ignore_eos=True)
    expected = run_all(engine_of(loaded), good).tokens
    engine, calls = engine_of(loaded, burst_steps=8), list[int]()
    hidden = loaded.model.hidden

    def breaking(*args: Any) -> torch.Tensor:
        out = hidden(*args)
        calls.append(len(out))
        if len(calls) == 7:
            out[1] = torch.nan
        return out

    monkeypatch.setattr(loaded.model, "hidden", breaking)
    bad = request("bad", prompt_of(9, 1), n=2, max_tokens=20, ignore_eos=True)
    result = run_all(engine, good, bad)
    assert [*result.failed] == ["bad"]
    assert result.tokens["good", 0] == expected["good", 0]
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_abort_all_leaves_nothing_behind(burst_of: Callable[..., Engine]) -> None:
    engine = burst_of()
    engine.add(request("a", prompt_of(30), n=4, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.abort_all()
    assert engine.has_work  # the device is still at it
    assert engine.step() == []
    while engine.has_work:
        assert engine.step() == []
    assert engine.stats().free_blocks == engine.stats().total_blocks
    engine.check_integrity()


def test_an_id_used_again_does_not_get_the_old_tokens(burst_of: Callable[..., Engine]) -> None:
    old = request("r", prompt_of(30), max_tokens=50, ignore_eos=True)
    new = request("r", prompt_of(12, 5), max_tokens=30, seed=9, ignore_eos=True)
    expected = run_all(burst_of(), new).tokens
    engine = burst_of()
    engine.add(old)
    for _ in range(3):
        engine.step()
    engine.abort("r")
    assert run_all(engine, new).tokens == expected


def test_a_failing_device_is_an_engine_error(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(loaded, burst_steps=4)
    engine.add(request("r", max_tokens=30, ignore_eos=True))
    engine.step()
    engine.step()

    def broken(*_: Any) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(loaded.model, "hidden", broken)
    with pytest.raises(EngineError, match="device-side assert"):
        run_all(engine)


def test_choosing_without_the_host_equals_the_sampler() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 72) * 4
    logits[3, 7] = torch.nan
    logits[4] = -torch.inf
    scale = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0, 0.5])
    uniforms = torch.rand(6, dtype=torch.float64)
    found = choose(logits, uniforms, scale, VOCAB_SIZE)
    assert found[0] == logits[0, :VOCAB_SIZE].argmax()
    assert found[[3, 4]].tolist() == [NO_TOKEN, NO_TOKEN]
    for row in (1, 2, 5):
        cdf = torch.softmax(logits[row, :VOCAB_SIZE].double() * scale[row], -1).cumsum(-1)
        assert found[row] == torch.searchsorted(cdf, uniforms[row])


def test_buckets() -> None:
    assert power_buckets(1) == [1]
    assert power_buckets(2) == [1, 2]
    assert power_buckets(48) == [1, 2, 4, 8, 16, 32, 48]
    assert power_buckets(64) == [1, 2, 4, 8, 16, 32, 64]
