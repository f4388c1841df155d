"""Which models are in memory: the decisions, on their own."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.cluster.residency import (
    MOST_DEATHS,
    RETRY_S,
    Admit,
    Load,
    Refuse,
    Residency,
    Unload,
)

WAIT_S = 60.0


def residency(budget=10, pinned=(), held=(), **needs) -> Residency:
    made = Residency(wait_s=WAIT_S, pinned=pinned)
    made.configure(needs, budget)
    made.begin(dict.fromkeys(held, True), 0.0)
    return made


def ask(made: Residency, request_id: str, model: str, now=0.0, only=None):
    made.arrive(request_id, model, now, is_patient=False)
    return made.turn(now, only)


def states(made: Residency) -> dict[str, str]:
    return {status.name: status.state for status in made.status()}


def test_a_request_for_an_open_model_runs_at_once():
    made = residency(a=5, held=["a"])
    assert ask(made, "1", "a") == [Admit("1")]


def test_a_model_is_loaded_for_a_request_and_serves_in_order():
    made = residency(a=5, b=5, held=["a"])
    assert ask(made, "1", "b") == [Load("b")]
    assert ask(made, "2", "b") == []
    made.loaded("b", 1.0, seconds=1.0)
    assert made.turn(1.0) == [Admit("1"), Admit("2")]
    assert states(made) == {"a": "open", "b": "open"}


def test_the_least_recently_used_makes_room_and_no_other():
    made = residency(a=3, b=3, c=3, d=3, held=["a", "b", "c"])
    for name, now in (("b", 1.0), ("a", 2.0), ("c", 3.0)):
        ask(made, name, name, now)
        made.leave(name, now)
    assert ask(made, "1", "d", 4.0) == [Unload("b")]
    made.unloaded("b")
    assert made.turn(4.0) == [Load("d")]


def test_a_large_model_takes_the_place_of_a_large_one_not_also_of_a_small_one():
    made = residency(small=1, large=8, other=8, held=["small", "large"])
    ask(made, "1", "large", 1.0)
    made.leave("1", 1.0)
    assert ask(made, "2", "other", 2.0) == [Unload("large")]


def test_what_runs_is_finished_and_what_is_new_waits():
    made = residency(a=6, b=6, held=["a"])
    assert ask(made, "1", "a") == [Admit("1")]
    assert ask(made, "2", "b") == []
    assert ask(made, "3", "a") == []
    assert states(made)["a"] == "draining"
    made.leave("1", 1.0)
    assert made.turn(1.0) == [Unload("a")]
    made.unloaded("a")
    assert made.turn(1.0) == [Load("b")]
    made.loaded("b", 2.0, seconds=1.0)
    assert made.turn(2.0) == [Admit("2")]
    assert states(made)["b"] == "open", "it has only just come"
    assert made.turn(3.0) == []
    assert states(made)["b"] == "draining"
    made.leave("2", 3.5)
    assert made.turn(3.5) == [Unload("b")]


def test_a_model_that_drains_for_nobody_opens_again():
    made = residency(a=6, b=6, held=["a"])
    ask(made, "1", "a")
    ask(made, "2", "b")
    ask(made, "3", "a")
    made.leave("2", 1.0)  # its client has gone
    assert made.turn(1.0) == [Admit("3")]


def test_even_a_model_that_took_no_time_to_load_serves_who_waits():
    made = residency(a=6, b=6)
    assert ask(made, "1", "a") == [Load("a")]
    assert ask(made, "2", "b") == []
    made.loaded("a", 1.0, seconds=0.0)
    assert made.turn(1.0) == [Admit("1")]


def test_a_model_that_has_just_come_stays_while_it_has_work_and_a_little_longer():
    made = residency(a=6, b=6)
    ask(made, "1", "a")
    made.loaded("a", 10.0, seconds=10.0)
    assert made.turn(10.0) == [Admit("1")]
    made.leave("1", 11.0)
    assert ask(made, "2", "b", 11.5) == [], "its next request may follow at once"
    assert ask(made, "3", "a", 11.6) == [Admit("3")]
    assert made.turn(19.0) == []
    made.leave("3", 19.0)
    assert made.turn(20.0) == [Unload("a")]


def test_the_oldest_request_comes_first():
    made = residency(a=6, b=6, c=6, held=["a"])
    ask(made, "0", "a")
    assert ask(made, "1", "c") == []
    assert ask(made, "2", "b") == []
    made.leave("0", 1.0)
    assert made.turn(1.0) == [Unload("a")]
    made.unloaded("a")
    assert made.turn(1.0) == [Load("c")]


def test_a_request_waits_only_so_long():
    made = residency(a=6, b=6, held=["a"])
    ask(made, "1", "a")
    ask(made, "2", "b")
    assert made.turn(WAIT_S - 1) == []
    (refusal,) = made.turn(WAIT_S)
    assert isinstance(refusal, Refuse)
    assert (refusal.request_id, refusal.code) == ("2", "model_not_loaded")
    assert refusal.retry_after > 0


def test_a_patient_request_waits_for_ever():
    made = residency(a=6, b=6, held=["a"])
    ask(made, "1", "a")
    made.arrive("2", "b", 0.0, is_patient=True)
    assert made.turn(1e6) == []


def test_a_failed_load_is_told_at_once_and_tried_again_later():
    made = residency(a=6)
    ask(made, "1", "a")
    made.failed("a", 1.0, "corrupt")
    refusal, unload = sorted(made.turn(1.0), key=lambda action: type(action).__name__)
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.retry_after) == ("model_load_failed", 0)
    assert unload == Unload("a"), "some ranks may have it"
    made.unloaded("a")
    assert isinstance(ask(made, "2", "a", 2.0)[0], Refuse)
    assert ask(made, "3", "a", 1.0 + RETRY_S) == [Load("a")]


def test_an_operator_has_a_failed_load_tried_again_at_once():
    made = residency(a=6)
    ask(made, "1", "a")
    made.failed("a", 1.0, "corrupt")
    made.turn(1.0)
    made.unloaded("a")
    assert made.load("a") == ""
    assert made.turn(2.0) == [Load("a")]


def test_a_pinned_model_stays_and_what_does_not_fit_beside_it_is_told():
    made = residency(a=6, b=6, pinned=["a"], held=["a"])
    (refusal,) = ask(made, "1", "b")
    assert isinstance(refusal, Refuse)
    assert refusal.code == "no_room"
    assert "pinned a" in refusal.message
    assert made.unload("a") != ""
    made.unpin("a")
    assert ask(made, "2", "b") == [Unload("a")]


def test_a_pinned_model_is_loaded_without_any_request():
    assert residency(a=6, pinned=["a"]).turn(0.0) == [Load("a")]


def test_pinning_more_than_there_is_room_for_is_refused():
    made = residency(a=6, b=6)
    assert made.pin("a") == ""
    assert "pinned a" in made.pin("b")


def test_a_load_that_a_pin_makes_impossible_is_told():
    """It was wanted for ever."""
    made = residency(budget=10, held=["a"], a=4, b=8)
    made.arrive("1", "a", 0.0, is_patient=False)
    made.turn(0.0)
    assert made.load("b") == ""
    assert made.turn(0.0) == []  # it waits for the request
    assert made.pin("a") == ""
    assert made.turn(0.0) == []
    assert not made.is_busy
    (b,) = [s for s in made.status() if s.name == "b"]
    assert (b.failures, "beside the pinned a" in b.problem) == (1, True)


def test_an_operator_unloads_a_model_and_the_next_request_brings_it_back():
    made = residency(a=6, held=["a"])
    assert made.unload("a") == ""
    assert made.turn(0.0) == [Unload("a")]
    assert ask(made, "1", "a") == []
    made.unloaded("a")
    assert made.turn(1.0) == [Load("a")]


def test_without_a_limit_nothing_goes():
    made = residency(budget=0, a=6, b=6, held=["a"])
    assert ask(made, "1", "b") == [Load("b")]
    assert states(made)["a"] == "open"


def test_what_ran_on_a_dead_group_comes_first_on_the_next():
    made = residency(a=5, b=5, held=["a", "b"])
    ask(made, "1", "a")
    made.lose()
    made.arrive("2", "a", 1.0, is_patient=False)
    made.begin({"a": True}, 2.0)
    assert made.turn(1e6) == [Admit("1"), Admit("2")]


def test_a_load_is_done_again_after_a_death_but_not_for_ever():
    made = residency(a=6)
    ask(made, "1", "a")
    for _ in range(MOST_DEATHS - 1):
        made.lose()
        made.begin({}, 1.0)
        assert made.turn(1.0) == [Load("a")]
    made.lose()
    made.begin({}, 1.0)
    (refusal,) = made.turn(1.0)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "model_load_failed"


def test_a_model_that_only_some_ranks_have_goes_from_all_first():
    made = residency(a=6)
    made.begin({"a": False}, 0.0)
    assert ask(made, "1", "a") == [Unload("a")]
    made.unloaded("a")
    assert made.turn(0.0) == [Load("a")]


def test_a_suspect_runs_alone_and_its_model_takes_the_place_of_one_others_wait_for():
    made = residency(a=6, b=6, held=["a"])
    assert ask(made, "1", "a", only="2") == []
    assert ask(made, "2", "b", only="2") == [Unload("a")]
    made.unloaded("a")
    assert made.turn(0.0, "2") == [Load("b")]
    made.loaded("b", 1.0, 0.0)
    assert made.turn(1.0, "2") == [Admit("2")]
    made.leave("2", 2.0)
    assert made.turn(2.0) == [Unload("b")]


def test_models_that_are_no_longer_configured_are_forgotten_with_their_requests():
    made = residency(a=6, b=6, held=["a"])
    ask(made, "1", "b")
    made.lose()
    made.configure({"a": 6}, 10)
    made.begin({"a": True}, 0.0)
    assert made.turn(0.0) == []
    made.leave("1", 0.0)


NAMES = "abcd"
OPERATORS = ["pin", "unpin", "load", "unload"]
DEATHS = ["die", "die and come back in part"]
OFTEN = ["ask", "ask", "ask", "answer", "answer"]
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [*OFTEN, "ask patiently", "end", "gone", "fail", "wait", *DEATHS, *OPERATORS]
        ),
        st.integers(0, 3),
    ),
    max_size=60,
)


class World:
    """Ranks that do as they are told when the test says so, and checks after each step."""

    def __init__(self, needs: list[int], budget: int) -> None:
        self.needs = dict(zip(NAMES, needs, strict=True))
        self.budget = budget
        self.decider = Residency(wait_s=WAIT_S)
        self.decider.configure(self.needs, budget)
        self.decider.begin({}, 0.0)
        self.now, self.count = 0.0, 0
        self.held: set[str] = set()  # as the ranks have it, on their way in or out as well
        self.orders: list[Load | Unload] = []
        self.open: set[str] = set()
        self.waiting: dict[str, tuple[str, float]] = {}
        self.running: dict[str, str] = {}
        self.patient: set[str] = set()  # those that may wait for ever

    def turn(self) -> None:
        admitted: dict[str, list[int]] = {}
        for action in self.decider.turn(self.now):
            if isinstance(action, Admit):
                model, _ = self.waiting.pop(action.request_id)
                assert model in self.open, "a request runs on a model that is not there"
                self.running[action.request_id] = model
                admitted.setdefault(model, []).append(int(action.request_id))
            elif isinstance(action, Refuse):
                self.waiting.pop(action.request_id)
                late = action.code == "model_not_loaded"
                assert not late or action.request_id not in self.patient
            else:
                self.order(action)
        for model, numbers in admitted.items():
            assert numbers == sorted(numbers)
            later = [int(i) for i, (m, _) in self.waiting.items() if m == model]
            assert all(number > max(numbers) for number in later), "overtaken"
        assert sum(self.needs[name] for name in self.held) <= self.budget
        for request_id, (_, since) in self.waiting.items():
            late = self.now - since >= WAIT_S
            assert not late or request_id in self.patient, "waits for longer than it may"

    def order(self, action: Load | Unload) -> None:
        assert len(self.orders) < len(NAMES)
        if isinstance(action, Load):
            assert action.model not in self.held
            self.held.add(action.model)
        else:
            assert action.model not in self.running.values(), "unloaded under a request"
            self.open.discard(action.model)
        self.orders.append(action)

    def happen(self, what: str, which: int) -> None:
        name = NAMES[which]
        self.now += 1.0
        if what in ("ask", "ask patiently"):
            self.count += 1
            self.waiting[str(self.count)] = (name, self.now)
            if is_patient := what != "ask":
                self.patient.add(str(self.count))
            self.decider.arrive(str(self.count), name, self.now, is_patient=is_patient)
        elif what == "end" and self.running:
            request_id = [*self.running][which % len(self.running)]
            del self.running[request_id]
            self.decider.leave(request_id, self.now)
        elif what == "gone" and self.waiting:
            request_id = [*self.waiting][which % len(self.waiting)]
            del self.waiting[request_id]
            self.decider.leave(request_id, self.now)
        elif what in ("answer", "fail") and self.orders:
            self.answer(self.orders.pop(0), ok=what == "answer")
        elif what.startswith("die"):
            self.die(lacking=name if what.endswith("part") else None)
        elif what == "wait":
            self.now += WAIT_S / 2
        elif what in OPERATORS:
            getattr(self.decider, what)(name)
        self.turn()

    def answer(self, order: Load | Unload, *, ok: bool) -> None:
        if isinstance(order, Unload):
            self.held.discard(order.model)
            self.decider.unloaded(order.model)
        elif ok:
            self.open.add(order.model)
            self.decider.loaded(order.model, self.now, seconds=2.0)
        else:
            self.decider.failed(order.model, self.now, "no")

    def die(self, lacking: str | None) -> None:
        """The group ends; in the next one a rank lacks a model that the others have."""
        back = {i: (model, self.now) for i, model in self.running.items()}
        self.patient |= back.keys()
        self.waiting = dict(sorted((back | self.waiting).items(), key=lambda item: int(item[0])))
        self.running, self.orders = {}, []
        self.held = set(self.open)
        self.open.discard(lacking)
        self.decider.lose()
        self.decider.begin({name: name != lacking for name in self.held}, self.now)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(6, 14), EVENTS)
def test_never_above_the_budget_in_order_and_everybody_is_served(needs, budget, events):
    world = World(needs, budget)
    for what, which in events:
        world.happen(what, which)
    for name in NAMES:
        world.decider.unpin(name)
    for _ in range(400):  # nothing new comes, and the ranks do as they are told
        if not (world.waiting or world.running or world.orders or world.decider.is_busy):
            break
        world.happen("answer", 0)
        world.happen("end", 0)
    assert not world.waiting
    assert not world.running
    assert not world.decider.is_busy  # what operators asked for has been done, or is told


def test_two_models_that_compete_take_turns():
    """Each serves what has come for it meanwhile; nobody waits for more than one turn of the
    other."""
    world, rounds = World([6, 6, 1, 1], 6), 3
    for _ in range(rounds):
        for which in (0, 1):
            world.happen("ask", which)
            world.happen("ask", which)
    served = []
    for _ in range(40):
        world.happen("answer", 0)
        served += [*world.running.values()]
        for _ in range(len(world.running)):
            world.happen("end", 0)
    assert served == ["a"] * 2 * rounds + ["b"] * 2 * rounds
