"""Scheduling without a network: a fake runner checks every slot of the cache that a step reads."""

import random
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.engine.model_runner import StepOutput
from nanogpt.engine.sampler import NO_TOKEN
from nanogpt.engine.scheduler import Batch, Scheduler
from nanogpt.engine.sequence import Sequence
from nanogpt.errors import ConfigError
from nanogpt.request import GenerateRequest
from tests.engine_utils import (
    VOCAB_SIZE,
    Collector,
    FakeRunner,
    fake_engine,
    fake_output,
    request,
    run_all,
)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def test_a_single_request() -> None:
    result = run_all(fake_engine(), request("r", [1, 2, 3], max_tokens=5))
    assert len(result.tokens["r", 0]) == 5
    assert result.finish_reasons == {("r", 0): "length"}


def test_long_prompts_are_computed_in_chunks_within_the_budget() -> None:
    engine = fake_engine(max_batch_tokens=16)
    result = run_all(
        engine, request("a", prompt_of(50)), request("b", prompt_of(40, 1), max_tokens=8)
    )
    sizes = [sum(c.end - c.start for c in batch.chunks) for batch in engine._runner.batches]
    assert max(sizes) == 16
    assert sizes[:4] == [16] * 4  # mixed where one prompt ends
    assert sizes[4:7] == [1 + 8] * 3  # a prompt beside a decode: half of the budget
    assert len(result.tokens["a", 0]) == 14, "the context ends the choice"


def test_decode_goes_on_while_a_long_prompt_is_computed() -> None:
    engine, collector = fake_engine(max_batch_tokens=16), Collector()
    engine.add(request("first", [1, 2], max_tokens=20))
    collector.take(engine.step())
    engine.add(request("long", prompt_of(60), max_tokens=1))
    for done in range(2, 10):
        assert ("long", 0) not in collector.finish_reasons
        collector.take(engine.step())
        assert len(collector.tokens["first", 0]) == done
    assert ("long", 0) in collector.finish_reasons


def test_prompt_of_n_choices_is_computed_once() -> None:
    engine = fake_engine(max_batch_tokens=64)
    result = run_all(engine, request("r", prompt_of(30), n=16, max_tokens=6))
    assert engine.stats().prompt_tokens == 30
    assert engine.stats().generated_tokens == 16 * 6
    assert len({tuple(result.tokens["r", i]) for i in range(16)}) > 1
    copies = [copy for batch in engine._runner.batches for copy in batch.copies]
    assert len(copies) == 15, "the last partial block is copied for all choices but one"


def test_128_choices_of_900_tokens_hold_their_prompt_once() -> None:
    """57 blocks of 16 for the prompt, its partly filled last one copied for each choice but one;
    then each choice has blocks for its own tokens only."""
    engine = fake_engine(
        num_kv_blocks=600,
        block_size=16,
        max_num_seqs=128,
        max_batch_tokens=512,
        context_length=1024,
    )

    def run(batch: Batch) -> StepOutput:  # the fake one's checks would take minutes here
        count = sum(len(chunk.samplers) for chunk in batch.chunks)
        return StepOutput([1] * count, [None] * count, [])

    engine._runner.run = run  # type: ignore[method-assign]
    engine.add(request("r", prompt_of(900), n=128, max_tokens=21))
    engine.step()
    engine.step()  # the prompt is complete, and every choice has a token
    assert (engine.stats().running, 600 - engine.stats().free_blocks) == (128, 57)
    most = 0
    while engine.has_work:
        most = max(most, 600 - engine.stats().free_blocks)
        engine.step()
    assert most == 56 + 128 * 2  # 900 + 20 tokens end in the second block after the 56 full ones
    assert engine.stats().prompt_tokens == 900
    assert engine.stats().preemptions == 0
    assert engine.stats().generated_tokens == 128 * 21


def test_prompts_of_several_requests_share_a_step() -> None:
    engine = fake_engine(max_batch_tokens=32)
    for i in range(4):
        engine.add(request(f"r{i}", prompt_of(10, i)))
    engine.step()
    (batch,) = engine._runner.batches  # type: ignore[attr-defined]
    assert [(c.start, c.end) for c in batch.chunks] == [(0, 10), (0, 10), (0, 10), (0, 2)]


def test_blocks_of_a_full_prompt_are_not_copied() -> None:
    engine = fake_engine()
    run_all(engine, request("r", prompt_of(32), n=4, max_tokens=6))
    assert not any(batch.copies for batch in engine._runner.batches)


def test_choices_that_do_not_fit_together_run_some_at_a_time() -> None:
    req = request("r", prompt_of(30), n=128, max_tokens=10)
    engine = fake_engine(num_kv_blocks=40, max_num_seqs=16)
    result = run_all(engine, req)
    assert result.tokens == {("r", i): fake_output(req, i) for i in range(128)}
    assert engine.stats().prompt_tokens < 128 * 30 / 4, "siblings use the prefix cache"


def test_preempted_choices_are_recomputed_without_a_trace() -> None:
    reqs = [request(f"r{i}", prompt_of(8, i), max_tokens=40) for i in range(6)]
    engine = fake_engine(num_kv_blocks=24)
    result = run_all(engine, *reqs)
    assert engine.stats().preemptions > 0
    for req in reqs:
        assert result.tokens[req.request_id, 0] == fake_output(req, 0)


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    engine = fake_engine(num_kv_blocks=16, max_batch_tokens=128)
    for name in ("a", "b"):  # 8 blocks each
        engine.add(request(name, prompt_of(32, ord(name)), max_tokens=2))
    started = []
    while engine.has_work:
        started.append([event.request_id for event in engine.step()])
    assert started == [["a"], ["a"], ["b"], ["b"]]


def test_the_first_in_order_is_never_preempted() -> None:
    engine, collector = fake_engine(num_kv_blocks=16), Collector()
    for i in range(8):
        engine.add(request(f"r{i}", prompt_of(6, i), max_tokens=50))
    for done in range(1, 51):
        collector.take(engine.step())
        assert len(collector.tokens["r0", 0]) == done
    assert engine.stats().preemptions > 0


def test_lower_priority_value_is_admitted_first() -> None:
    engine, collector = fake_engine(max_num_seqs=1), Collector()
    for name, priority in (("late", 5), ("normal", 0), ("second", 0), ("urgent", -1)):
        engine.add(request(name, [1], max_tokens=1, priority=priority))
    order = []
    while engine.has_work:
        events = engine.step()
        collector.take(events)
        order += [event.request_id for event in events]
    assert order == ["urgent", "normal", "second", "late"]


def test_prefix_cache_serves_a_repeated_prompt() -> None:
    engine = fake_engine()
    prompt = prompt_of(32)
    first = run_all(engine, request("a", prompt, max_tokens=3))
    again = run_all(engine, request("b", prompt, max_tokens=3))
    assert first.cached["a", 0] == 0
    assert again.cached["b", 0] == 28, "whole blocks of 4, and the last token is always computed"
    assert again.tokens["b", 0] == first.tokens["a", 0]
    assert engine.stats().prompt_tokens == 32 + 4
    assert engine.stats().cached_tokens == 28


def test_requests_of_the_same_step_share_a_prefix() -> None:
    engine = fake_engine(max_batch_tokens=128)
    prompt = prompt_of(32)
    run_all(engine, *(request(f"r{i}", [*prompt, i], max_tokens=2, seed=i) for i in range(4)))
    assert engine.stats().prompt_tokens == 33 + 3


def test_generated_tokens_are_in_the_prefix_cache() -> None:
    engine = fake_engine()
    result = run_all(engine, request("a", prompt_of(10), max_tokens=20))
    follow_up = [*prompt_of(10), *result.tokens["a", 0], 7]
    assert run_all(engine, request("b", follow_up)).cached["b", 0] == 28


def test_least_recently_used_prefix_is_evicted_first() -> None:
    engine = fake_engine(num_kv_blocks=24)
    for name, seed in (("a", 1), ("b", 2), ("a2", 1), ("c", 3)):
        run_all(engine, request(name, prompt_of(36, seed), max_tokens=1))
    # b is older than a: it loses its end to c, while a's beginning is whole.
    assert run_all(engine, request("a3", prompt_of(36, 1), max_tokens=1)).cached["a3", 0] == 32
    assert run_all(engine, request("b2", prompt_of(36, 2), max_tokens=1)).cached["b2", 0] < 32


def test_abort_frees_memory_at_once_and_ends_events() -> None:
    engine, collector = fake_engine(), Collector()
    engine.add(request("a", prompt_of(20), n=4, max_tokens=30))
    engine.add(request("b", prompt_of(20, 1), max_tokens=10))
    for _ in range(3):
        collector.take(engine.step())
    engine.abort("a", 2)
    engine.check_integrity()
    free = engine.stats().free_blocks
    engine.abort("a")
    engine.check_integrity()
    assert engine.stats().free_blocks > free
    engine.abort("a")
    engine.abort("unknown", 3)
    events = [event for _ in range(30) for event in engine.step()]
    assert {event.request_id for event in events} == {"b"}
    assert not engine.has_work
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_abort_of_the_choice_that_computes_the_prompt() -> None:
    """The siblings' prompt is being computed by the first choice: another one must take over."""
    req = request("r", prompt_of(40), n=3, max_tokens=5)
    for steps in range(5):
        engine, collector = fake_engine(max_batch_tokens=16), Collector()
        engine.add(req)
        for _ in range(steps):
            collector.take(engine.step())
        engine.abort("r", 0)
        engine.check_integrity()
        while engine.has_work:
            collector.take(engine.step())
            engine.check_integrity()
        assert {("r", 1), ("r", 2)} <= collector.finish_reasons.keys()
        assert collector.tokens["r", 2] == fake_output(req, 2)
        assert engine.stats().prompt_tokens == 40


def test_only_own_choices_run_and_finished_ones_do_not() -> None:
    req = request(
        "r", [1, 2, 3], [4, 5], n=3, owners=(0, 1, 0, 1, 0, 1), finished=(2,), max_tokens=4
    )
    mine = run_all(fake_engine(rank=0), req)
    other = run_all(fake_engine(rank=1), req)
    assert set(mine.finish_reasons) == {("r", 0), ("r", 4)}
    assert set(other.finish_reasons) == {("r", 1), ("r", 3), ("r", 5)}
    for part in (mine, other):
        for key, tokens in part.tokens.items():
            assert tokens == fake_output(req, key[1])


def test_resumed_choices_go_on_where_they_were() -> None:
    plain = request("r", prompt_of(9), n=4, max_tokens=12)
    full = {("r", i): fake_output(plain, i) for i in range(4)}
    cuts = (0, 5, 12, 11)
    resumed = tuple(tuple(full["r", i][:cut]) for i, cut in enumerate(cuts))
    engine = fake_engine()
    result = run_all(engine, request("r", prompt_of(9), n=4, max_tokens=12, resumed=resumed))
    assert result.tokens == full
    assert set(result.finish_reasons.values()) == {"length"}
    assert engine.stats().generated_tokens == 12 + 7 + 0 + 1


@pytest.mark.parametrize("n", [1, 3])
def test_max_tokens_zero_ends_at_once(n: int) -> None:
    engine = fake_engine()
    result = run_all(engine, request("r", [1, 2], n=n, max_tokens=0))
    assert result.finish_reasons == {("r", i): "length" for i in range(n)}
    assert not any(result.tokens.values())
    assert engine.stats().steps == 0


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompts_are_scored_before_their_tokens(max_tokens: int) -> None:
    engine = fake_engine(max_batch_tokens=16)
    req = request(
        "r", prompt_of(40), [5], prompt_of(3), n=2, max_tokens=max_tokens, prompt_logprobs=True
    )
    engine.add(req)
    collector = Collector()
    while engine.has_work:
        for event in engine.step():
            if ("r", 0) in collector.tokens:
                assert len(collector.scores["r", 0]) == 39
            collector.take([event])
    assert [len(collector.scores.get(("r", i), [])) for i in range(3)] == [39, 0, 2]
    assert [-entry.logprob for entry in collector.scores["r", 0]] == prompt_of(40)[1:]
    assert len(collector.finish_reasons) == 6


def test_scored_prompts_do_not_use_the_prefix_cache_but_fill_it() -> None:
    engine = fake_engine()
    run_all(engine, request("a", prompt_of(32)))
    scored = run_all(engine, request("b", prompt_of(32), max_tokens=0, prompt_logprobs=True))
    assert len(scored.scores["b", 0]) == 31
    assert scored.cached["b", 0] == 0
    assert run_all(engine, request("c", prompt_of(32))).cached["c", 0] == 28


def test_stop_tokens_end_a_choice_and_are_not_part_of_it() -> None:
    tokens = fake_output(request("r", prompt_of(5), max_tokens=30), 0)
    stop = tokens[7]
    expected = tokens[: tokens.index(stop)]
    req = request("r", prompt_of(5), max_tokens=30, stop_token_ids=(stop,))
    by_id = run_all(fake_engine(), req)
    req = request("r", prompt_of(5), max_tokens=30)
    by_end = run_all(fake_engine(eos_token_id=stop), req)
    for result in (by_id, by_end):
        assert result.tokens["r", 0] == expected
        assert result.finish_reasons["r", 0] == "stop"
    req = request("r", prompt_of(5), max_tokens=30, ignore_eos=True)
    assert run_all(fake_engine(eos_token_id=stop), req).tokens["r", 0] == tokens


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "out of range"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"owners": (0, 0)}, "owners"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_an_invalid_request_fails_alone(change: dict[str, object], says: str) -> None:
    engine = fake_engine()
    result = run_all(engine, request("bad", [1, 2], **change), request("good", [1, 2]))
    assert says in result.failed["bad"]
    assert set(result.finish_reasons) == {("good", 0)}


def test_a_request_without_a_token_to_sample_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    token = FakeRunner._token

    def broken(runner: FakeRunner, seq: Sequence) -> int:
        is_broken = seq.request_id == "bad" and seq.output_len == seq.choice_j
        return NO_TOKEN if is_broken else token(runner, seq)

    monkeypatch.setattr(FakeRunner, "_token", broken)
    engine = fake_engine()
    result = run_all(engine, request("bad", prompt_of(30), n=3), request("good", [1], n=2))
    assert "no token" in result.failed["bad"]
    assert set(result.finish_reasons) == {("good", 0), ("good", 1)}
    assert engine.stats().free_blocks == engine.stats().total_blocks


@pytest.mark.parametrize("prompt", [[], [VOCAB_SIZE], [-1], [1] * 65])
def test_an_impossible_prompt_fails_alone(prompt: list[int]) -> None:
    result = run_all(fake_engine(), request("bad", prompt), request("good", [1, 2]))
    assert set(result.failed) == {"bad"}
    assert set(result.finish_reasons) == {("good", 0)}


def test_a_full_context_as_prompt_ends_at_once() -> None:
    result = run_all(fake_engine(), request("r", [1] * 64))
    assert result.finish_reasons == {("r", 0): "length"}
    assert result.tokens["r", 0] == []


def test_a_pool_smaller_than_a_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="one full context of 64 tokens needs 16"):
        fake_engine(num_kv_blocks=15)
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        fake_engine(max_num_seqs=8, max_batch_tokens=7)


def random_request(rng: random.Random, name: str) -> GenerateRequest:
    shared = prompt_of(24, rng.randrange(2))
    prompts = [
        [*shared[: rng.randrange(25)], *prompt_of(rng.randint(1, 20), rng.randrange(10**6))]
        for _ in range(rng.choice([1, 1, 2]))
    ]
    return request(
        name,
        *prompts,
        n=rng.choice([1, 1, 2, 5, 12]),
        priority=rng.choice([0, 0, 1]),
        tenant=rng.choice("abc"),
        weight=rng.choice([0.5, 1.0, 1.0, 3.0, 100.0]),  # a heavy one's turn comes at once
        seed=rng.randrange(10**6),
        max_tokens=rng.choice([0, 1, 5, 15, 60]),
        prompt_logprobs=rng.random() < 0.2,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_kv_blocks=st.integers(16, 30),
    max_num_seqs=st.integers(1, 10),
    max_batch_tokens=st.integers(10, 40),
)
def test_whatever_happens_every_choice_completes_once_with_its_own_tokens(
    seed: int, num_kv_blocks: int, max_num_seqs: int, max_batch_tokens: int
) -> None:
    rng = random.Random(seed)
    engine = fake_engine(
        num_kv_blocks=num_kv_blocks, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens
    )
    collector, requests, aborted = Collector(), [], set()
    for i in range(rng.randint(1, 12)):
        requests.append(random_request(rng, f"r{i}"))
        engine.add(requests[-1])
        for _ in range(rng.randrange(6)):
            collector.take(engine.step())
            engine.check_integrity()
        if rng.random() < 0.3:
            victim = rng.choice(requests)
            index = rng.choice([None, *range(len(victim.owners))])
            engine.abort(victim.request_id, index)
            engine.check_integrity()
            indices = range(len(victim.owners)) if index is None else [index]
            aborted |= {(victim.request_id, i) for i in indices} - collector.finish_reasons.keys()
    for _ in range(5000):
        if not engine.has_work:
            break
        collector.take(engine.step())
        engine.check_integrity()
    assert not engine.has_work
    assert engine.stats().free_blocks == num_kv_blocks
    for req in requests:
        for index in range(len(req.owners)):
            key = req.request_id, index
            assert (key in collector.finish_reasons) != (key in aborted)
            if key not in aborted:
                assert collector.tokens[key] == fake_output(req, index)
        for prompt_i, prompt in enumerate(req.prompts if req.params.prompt_logprobs else ()):
            if (req.request_id, prompt_i * req.n) not in aborted and len(prompt) > 1:
                scores = collector.scores[req.request_id, prompt_i]
                assert [-entry.logprob for entry in scores] == [*prompt[1:]]


def random_steps(
    seed: int, num_kv_blocks: int, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[object], int]:
    """What an engine does step by step under a random load, and how many steps were short ones."""
    steps: list[object] = []
    num_short = 0
    with monkeypatch.context() as patched:
        if not is_short:
            patched.setattr(Scheduler, "_advance", lambda scheduler: None)
        rng = random.Random(seed)
        engine = fake_engine(num_kv_blocks=num_kv_blocks, max_num_seqs=10)
        for i in range(400):
            if i < 300 and rng.random() < 0.06:
                tenant = {"tenant": rng.choice("ab"), "weight": rng.choice([1.0, 2.0])}
                req = random_request(rng, f"r{i}")
                engine.add(msgspec.structs.replace(req, **tenant))
            events = sorted(engine.step(), key=repr)
            batches = engine._runner.batches  # type: ignore[attr-defined]
            batch = batches.pop() if batches else Batch()
            num_short += batch.follows
            chunks = [(c.seq.request_id, c.seq.index, c.start, c.end) for c in batch.chunks]
            steps.append((events, sorted(chunks), engine.stats()))
    return steps, num_short


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_kv_blocks", [18, 40, 200])
def test_the_short_way_does_what_the_long_one_does(
    seed: int, num_kv_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, count = random_steps(seed, num_kv_blocks, True, monkeypatch)
    long, none = random_steps(seed, num_kv_blocks, False, monkeypatch)
    assert short == long
    assert count > 50
    assert not none


def test_scheduling_never_loads_torch() -> None:
    """In a process of its own: neither directly nor through anything it imports."""
    code = (
        "import sys, nanogpt.engine.scheduler, nanogpt.engine.block_manager, "
        "nanogpt.engine.sequence; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
