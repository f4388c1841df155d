"""Service shared between tenants: the real scheduler, a fake runner, and everybody's progress."""

import random
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.engine.engine import Engine
from nanogpt.engine.fairness import MAX_IDLE_FLOWS, TURN_TOKENS, Flow, Flows
from nanogpt.engine.model_runner import StepOutput
from nanogpt.engine.scheduler import MAX_SWAPS, Batch
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.waiting import WaitingQueue, admission_key
from nanogpt.request import GenerateRequest, TokenEvent
from tests.engine_utils import Collector, fake_engine, fake_output, request

PROMPT = [*range(13)]
LONG = 1024 - len(PROMPT)


def long_context_engine(**options: int) -> Engine:
    """Room in memory for everybody, places for 16, and a runner without checks: they would take
    most of the time with this many tokens."""
    engine = fake_engine(**{"num_kv_blocks": 8192, "context_length": 1024, **options})
    engine._runner.run = same_token
    return engine


def same_token(batch: Batch) -> StepOutput:
    sampled = [seq for chunk in batch.chunks for seq in chunk.samplers]
    return StepOutput([1] * len(sampled), [None] * len(sampled), [])


class Progress:
    """Tokens of each request over the steps of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.collector = engine, Collector()
        self.tokens: Counter[str] = Counter()
        self.steps: list[Counter[str]] = []

    def add(self, request_id: str, **options: Any) -> GenerateRequest:
        """A request of the tenant of the same name, unless told otherwise."""
        options = {"tenant": request_id, "max_tokens": LONG, **options}
        new = request(request_id, options.pop("prompt", PROMPT), **options)
        self.engine.add(new)
        return new

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            events = self.engine.step()
            self.collector.take(events)
            got = Counter(e.request_id for e in events if isinstance(e, TokenEvent))
            self.steps.append(got)
            self.tokens += got
        self.engine.check_integrity()

    def over(self, num_steps: int) -> Counter[str]:
        """What each got in so many more steps."""
        before = self.tokens.copy()
        self.run(num_steps)
        return self.tokens - before

    @property
    def swaps(self) -> int:
        return self.engine.stats().fair_preemptions


def test_one_choice_is_served_at_once_beside_128() -> None:
    progress = Progress(long_context_engine())
    progress.add("many", n=128)
    progress.run(50)
    assert progress.tokens == {"many": 50 * 16}
    progress.add("one", max_tokens=40)
    progress.run(1)  # both have received the same by now, and the other came first
    assert progress.over(40) == {"one": 40, "many": 40 * 15}
    assert progress.collector.finish_reasons == {("one", 0): "length"}
    assert progress.swaps == 1
    assert progress.over(5)["many"] == 5 * 16, "its place is used again"


def test_the_one_preempted_does_not_come_back_in_the_same_step() -> None:
    """Both have received the same, and who makes room came first: it went to the head of the
    queue, and was started in the other's stead."""
    progress = Progress(long_context_engine(max_num_seqs=2))
    progress.add("a", n=2)
    progress.run(1)
    progress.add("b")
    progress.run(1)
    assert progress.steps[-1] == {"a": 1, "b": 1}


def test_a_tenant_alone_is_never_preempted_for_itself() -> None:
    progress = Progress(long_context_engine())
    for i in range(40):
        progress.add(f"r{i}", tenant="same", n=i % 3 + 1)
    progress.run(100)
    assert progress.swaps == 0


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75), (1 / 3, 0.25)])
def test_places_are_shared_by_weight_and_stay_where_they_are(weight: float, share: float) -> None:
    progress = Progress(long_context_engine())
    progress.add("a", n=64)
    progress.run(20)
    progress.add("b", n=64, weight=weight)
    progress.run(40)
    swaps = progress.swaps
    got = progress.over(400)
    assert got["b"] / got.total() == pytest.approx(share, abs=0.04)
    assert min(step["a"] for step in progress.steps[-400:]) >= 2, "nobody's stream stalls"
    assert min(step["b"] for step in progress.steps[-400:]) >= 2
    assert progress.swaps - swaps <= 4, "places don't swing to and fro"


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (100.0, 300.0), (0.01, 0.02)])
def test_tenants_take_turns_at_a_single_place(weights: tuple[float, float]) -> None:
    """And the service received is in proportion, within a turn of each."""
    progress = Progress(long_context_engine(max_num_seqs=1))
    for name, weight in zip("ab", weights, strict=True):
        progress.add(name, n=20, weight=weight)
    got = progress.over(8000)
    a, b = (got[name] / weight for name, weight in zip("ab", weights, strict=True))
    assert abs(a - b) <= TURN_TOKENS / min(weights) + 32 / min(weights)
    assert got.total() > 7900
    assert progress.swaps <= 8000 / TURN_TOKENS


def test_more_tenants_than_places_all_advance() -> None:
    progress = Progress(long_context_engine(max_num_seqs=4))
    names = [f"t{i}" for i in range(10)]
    for name in names:
        progress.add(name, n=3)
    progress.run(4000)
    counts = [progress.tokens[name] for name in names]
    assert min(counts) > 0
    assert max(counts) - min(counts) <= 2 * TURN_TOKENS


def test_a_newcomer_gets_no_credit_for_the_time_before() -> None:
    progress = Progress(long_context_engine(max_num_seqs=2))
    progress.add("a", n=40)
    progress.add("b", n=1)
    progress.run(1500)  # b has gone, and a has had far more than it
    progress.add("b2", n=40, tenant="b")
    got = progress.over(400)
    assert got["a"] == pytest.approx(got["b2"], abs=TURN_TOKENS)


def test_who_comes_back_with_more_than_the_others_waits_for_them() -> None:
    """Leaving and coming back must not wipe out what a tenant has had."""
    progress = Progress(long_context_engine(max_num_seqs=1, max_batch_tokens=1024))
    progress.add("a", n=10)
    progress.run(1)
    progress.add("big", prompt=[1] * 700, max_tokens=1)
    progress.run(300)
    assert ("big", 0) in progress.collector.finish_reasons
    progress.add("big again", tenant="big", prompt=[2] * 700, max_tokens=1)
    progress.run(300)
    assert ("big again", 0) not in progress.collector.finish_reasons
    progress.run(500)
    assert ("big again", 0) in progress.collector.finish_reasons


def test_a_shared_prompt_and_a_recomputation_are_charged_once() -> None:
    progress = Progress(fake_engine(num_kv_blocks=20, max_num_seqs=8, max_batch_tokens=16))
    progress.add("stays", max_tokens=50, priority=-1, tenant="x")
    flows = {}
    for name in "ab":
        progress.add(name, n=13, max_tokens=20, prompt=[ord(name) - 90] * 30)
        flows[name] = progress.engine._live[name][0].flow
    progress.run(1)
    progress.engine.abort("a", 0)  # another choice goes on with the prompt
    progress.engine.abort("b", 0)
    while len(progress.collector.finish_reasons) < 25:
        progress.run(1)
    assert progress.engine.stats().preemptions > 0
    assert flows["a"].service == flows["b"].service == 30 + 12 * 20


def test_what_the_prefix_cache_provides_is_free() -> None:
    progress = Progress(fake_engine())
    for name, charged in (("a", 32 + 5), ("b", 4 + 5)):
        progress.add(name, prompt=[7] * 32, max_tokens=5)
        flow = progress.engine._live[name][0].flow
        progress.run(5)
        assert not progress.engine.has_work
        assert flow.service == charged


def test_a_scored_prompt_that_is_preempted_goes_on_with_its_scores() -> None:
    """What was reported already is computed again without a report: it was an empty one."""
    progress = Progress(fake_engine(num_kv_blocks=16, max_batch_tokens=16))
    prompt = [*range(60)]
    progress.add("scored", prompt=prompt, prompt_logprobs=True, max_tokens=0)
    progress.run(2)
    progress.add("urgent", prompt=[3] * 63, max_tokens=1, priority=-1)
    progress.run(10)
    assert progress.swaps == 1
    scores = progress.collector.scores["scored", 0]
    assert [-entry.logprob for entry in scores] == prompt[1:]


def test_urgent_requests_take_places_and_give_them_back() -> None:
    progress = Progress(long_context_engine())
    progress.add("batch", n=64, priority=5, weight=100.0)
    progress.run(10)
    progress.add("urgent", n=16, max_tokens=60, priority=0)
    got = progress.over(40)
    assert got["urgent"] >= 16 * (40 - 16), "its choices start one a step"
    assert all(step["batch"] == 0 for step in progress.steps[-20:])
    progress.run(60)
    assert progress.over(5)["batch"] == 5 * 16
    assert progress.tokens["urgent"] == 16 * 60


def test_a_starving_class_does_not_hold_down_the_minimum_of_others() -> None:
    """A flow that waits behind a lower priority value keeps a counter of 0. One that joins the
    busy class must start with the others there, not with that."""
    progress = Progress(long_context_engine(max_num_seqs=2))
    progress.add("starving", priority=9)
    progress.add("a", n=40)
    progress.run(1000)
    progress.add("b", n=40)
    got = progress.over(600)
    assert got["a"] == pytest.approx(got["b"], abs=TURN_TOKENS)


def test_memory_is_taken_from_who_has_most() -> None:
    """A pool of two contexts: one tenant's many choices fill it, then others come with one each.
    They need more and more blocks, and all of these come from the many."""
    progress = Progress(fake_engine(num_kv_blocks=32))
    progress.add("many", n=16, max_tokens=51)
    progress.run(8)
    singles = [progress.add(name, max_tokens=30, prompt=[9] * 10) for name in ("one", "two")]
    progress.run(4)
    got = progress.over(20)
    assert (got["one"], got["two"]) == (20, 20)
    assert progress.engine.stats().preemptions > 0
    progress.run(10)
    for single in singles:
        name = single.request_id
        assert progress.collector.tokens[name, 0] == fake_output(single, 0)
    assert progress.tokens["many"] > 8 * 16


def test_nobody_is_preempted_in_vain() -> None:
    """A full context needs every block: the other tenant's only sequence is not a turn ahead."""
    progress = Progress(fake_engine(num_kv_blocks=16))
    progress.add("small", max_tokens=40)
    progress.run(3)
    progress.add("large", prompt=[5] * 63, max_tokens=1)
    progress.run(10)
    assert progress.swaps == 0
    progress.run(40)
    assert ("large", 0) in progress.collector.finish_reasons


def test_a_step_swaps_only_a_few() -> None:
    progress = Progress(long_context_engine())
    progress.add("many", n=64)
    progress.run(10)
    for i in range(10):
        progress.add(f"t{i}", prompt=[i], max_tokens=100)
    progress.run(1)
    before = progress.swaps
    for done in (MAX_SWAPS, 2 * MAX_SWAPS, 10):
        progress.run(1)
        assert progress.swaps - before == done
    assert progress.over(5) == {"many": 30, **{f"t{i}": 5 for i in range(10)}}


def random_request(rng: random.Random, name: str) -> GenerateRequest:
    return request(
        name,
        [rng.randrange(3)] * rng.randint(1, 60),
        n=rng.choice([1, 2, 12]),
        max_tokens=rng.choice([1, 5, 20, 60]),
        tenant=rng.choice("abcd"),
        weight=rng.choice([0.01, 0.5, 1.0, 1.0, 3.0, 100.0]),
        priority=rng.choice([0, 0, 1]),
    )


def check_first_advances(engine: Engine) -> None:
    """A step, after which the one that was first has more computed, is done, or gave way to one
    that went before it and waited."""
    scheduler = engine._scheduler
    first = min(scheduler.running, key=admission_key, default=None)
    if first is not None:
        key, computed = admission_key(first), first.num_computed
        waiting_key = admission_key(scheduler.waiting.peek()) if scheduler.waiting else None
    engine.step()
    engine.check_integrity()
    if first is None or first.index not in engine._live.get(first.request_id, {}):
        return
    if not first.running or first.num_computed == computed:
        assert waiting_key is not None
        assert waiting_key < key


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    turn=st.sampled_from([1, 4, 32]),
    num_kv_blocks=st.integers(16, 24),
    max_num_seqs=st.integers(1, 10),
    max_batch_tokens=st.integers(10, 40),
)
def test_the_first_in_order_always_advances(
    seed: int, turn: int, num_kv_blocks: int, max_num_seqs: int, max_batch_tokens: int
) -> None:
    """Unless one that goes before it takes its place. Turns are short here, so that they come."""
    rng = random.Random(seed)
    engine = fake_engine(
        num_kv_blocks=num_kv_blocks, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens
    )
    engine._runner.run = same_token
    num_added = rng.randint(2, 12)
    with patch("nanogpt.engine.fairness.TURN_TOKENS", turn):
        for i in range(num_added):
            engine.add(random_request(rng, f"r{i}"))
            for _ in range(rng.randrange(4) if i + 1 < num_added else 20_000):
                if not engine.has_work:
                    break
                check_first_advances(engine)
    assert not engine.has_work


# The parts


def sequence(tenant: str, arrival: int, *, priority: int = 0, weight: float = 1.0) -> Sequence:
    made = request("r", tenant=tenant, priority=priority, weight=weight)
    return Sequence(made, 0, arrival=arrival, context_length=64)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_waiting_queue_gives_the_least_served_first(seed: int) -> None:
    """Against min() over everything that waits, while counters grow and sequences come back."""
    rng = random.Random(seed)
    flows = [Flow(str(i), rng.choice([0, 0, 1])) for i in range(rng.randint(1, 6))]
    queue, waiting, gone = WaitingQueue(), list[Sequence](), list[Sequence]()
    for arrival in range(150):
        action = rng.randrange(6)
        if action < 2:
            flow = rng.choice(flows)
            new = sequence(flow.tenant, arrival, priority=flow.priority)
            new.flow = flow
            waiting.append(new)
            queue.push(new)
        elif action == 2 and waiting:
            least = min(waiting, key=admission_key)
            assert queue.peek() is least
            assert queue.pop() is least
            waiting.remove(least)
            gone.append(least)
        elif action == 3 and gone:
            waiting.append(gone.pop(rng.randrange(len(gone))))
            queue.push(waiting[-1])
        elif action == 4 and waiting:
            queue.remove(waiting.pop(rng.randrange(len(waiting))))
        else:
            rng.choice(flows).charge(rng.randrange(4))
        assert bool(queue) == bool(waiting)
    while queue:
        least = min(waiting, key=admission_key)
        assert queue.pop() is least
        waiting.remove(least)
    assert not waiting


def test_the_waiting_queue_forgets_what_was_removed() -> None:
    """Requests that come and go behind others never come up: their entries must not pile up."""
    queue, first, last = WaitingQueue(), Flow("first", 0), Flow("last", 1)
    for arrival in range(1000):
        seq = sequence("last", arrival, priority=1)
        seq.flow = last
        queue.push(seq)
        if arrival:
            queue.remove(seq)
    waits = sequence("first", 1000)
    waits.flow = first
    queue.push(waits)
    assert queue.pop() is waits
    assert queue.pop().arrival == 0
    for arrival in range(2000, 3000):
        seq = sequence("last", arrival, priority=1)
        seq.flow = last
        queue.push(seq)
        queue.remove(seq)
    assert len(queue._heap) < 50


def test_a_million_names_are_not_kept() -> None:
    flows = Flows()
    stays = sequence("stays", 0)
    flows.join(stays)
    for i in range(3 * MAX_IDLE_FLOWS):
        seq = sequence(f"t{i}", i)
        flows.join(seq)
        seq.flow.charge(5)
        flows.leave(seq)
    (peers,) = flows._classes.values()
    assert len(peers.idle) == MAX_IDLE_FLOWS
    flows.leave(stays)
    assert not flows._classes


def test_a_flow_takes_the_place_of_another_only_with_a_reason() -> None:
    def flow(service: float, weight: float = 1.0, priority: int = 0) -> Flow:
        new = Flow("", priority)
        new.service, new.weight = service, weight
        return new

    low, high = flow(0.0), flow(0.0)
    assert low.may_displace(high, 0, 2)
    assert not low.may_displace(high, 0, 1)
    assert not low.may_displace(low, 0, 9)
    assert not flow(1.0).may_displace(flow(0.0), 0, 9), "it has received more"
    assert flow(0.0).may_displace(flow(TURN_TOKENS), 1, 1), "a turn behind"
    assert not flow(0.0).may_displace(flow(TURN_TOKENS - 1), 1, 1)
    assert not flow(0.0).may_displace(flow(TURN_TOKENS), 2, 1), "it is catching up already"
    assert flow(0.0, weight=3.0).may_displace(high, 2, 2)
    assert not flow(0.0, weight=3.0).may_displace(high, 3, 2)
    assert flow(9.0).may_displace(flow(0.0, priority=1), 5, 1)
    assert not flow(0.0, priority=1).may_displace(flow(9999.0), 0, 5)


@settings(max_examples=300, deadline=None)
@given(
    services=st.tuples(st.floats(0, 2000), st.floats(0, 2000)),
    weights=st.tuples(st.floats(0.001, 1000), st.floats(0.001, 1000)),
    places=st.tuples(st.integers(0, 20), st.integers(1, 20)),
)
def test_what_one_flow_took_the_other_can_not_take_back(
    services: tuple[float, float], weights: tuple[float, float], places: tuple[int, int]
) -> None:
    flows = [Flow("a", 0), Flow("b", 0)]
    for flow, service, weight in zip(flows, services, weights, strict=True):
        flow.service, flow.weight = service, weight
    if flows[0].may_displace(flows[1], *places):
        assert not flows[1].may_displace(flows[0], places[1] - 1, places[0] + 1)
