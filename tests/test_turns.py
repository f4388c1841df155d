"""Models on one rank share its time."""

from collections import Counter

from nanogpt.cluster.turns import Turns

STEP_S = {"small": 0.01, "large": 0.2}


def serve(turns: Turns, names: list[str], seconds: float) -> Counter[str]:
    """How long each of them got."""
    had: Counter[str] = Counter()
    while sum(had.values()) < seconds:
        name = turns.choose(names)
        turns.charge(name, STEP_S[name])
        had[name] += STEP_S[name]
    return had


def test_equal_time_whatever_a_step_takes():
    had = serve(Turns(), ["small", "large"], 10.0)
    assert abs(had["small"] - had["large"]) <= STEP_S["large"] + 2 * STEP_S["small"]


def test_who_was_idle_has_nothing_to_make_up_for():
    turns = Turns()
    serve(turns, ["large"], 100.0)
    had = serve(turns, ["small", "large"], 2.0)
    assert had["large"] >= 0.8
    serve(turns, ["small"], 5.0)
    had = serve(turns, ["small", "large"], 2.0)
    assert abs(had["small"] - had["large"]) <= STEP_S["large"] + 2 * STEP_S["small"]
