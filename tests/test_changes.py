"""What the ranks answer to a change of models, as the residency is told."""

import msgspec
import pytest

from nanogpt.cluster.changes import Changes
from nanogpt.cluster.messages import LoadModel, ModelFailed, ModelLoaded, ModelUnloaded
from nanogpt.cluster.residency import Load, Residency, Unload
from tests.test_cluster import INFO

EPOCH = 5
ELSE = msgspec.structs.replace(INFO, fingerprint="01")


@pytest.fixture
def loading():
    """A group of two ranks that are told to load a model: (changes, residency, what is served)."""
    residency, served = Residency(wait_s=60.0), []
    residency.configure({"toy": 5}, 10)
    changes = Changes(residency, served.append)
    changes.greet(2)
    changes.begin(0.0)
    residency.load("toy")
    (action,) = residency.turn(0.0)
    assert action == Load("toy")
    assert changes.command(action, EPOCH) == LoadModel(EPOCH, "toy")
    return changes, residency, served


def state(residency: Residency):
    (status,) = residency.status()
    return status.state, status.problem


def test_a_model_is_there_once_all_ranks_have_it(loading):
    changes, residency, served = loading
    changes.answer(ModelLoaded(EPOCH, 1, INFO, 0.5), 1.0)
    assert (state(residency), served) == (("loading", ""), [])
    changes.answer(ModelLoaded(EPOCH, 0, INFO, 0.7), 1.0)
    assert (state(residency), served) == (("open", ""), [INFO])
    changes.answer(ModelFailed(EPOCH, 0, "toy", "late"), 1.0)  # nobody waits for it
    assert state(residency) == ("open", "")


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (ModelLoaded(EPOCH, 1, ELSE, 0.5), "different weights"),  # as on another machine
        (ModelFailed(EPOCH, 1, "toy", "no such file"), "no such file"),
    ],
)
def test_a_model_that_ranks_do_not_share_is_served_by_none(loading, second, problem):
    changes, residency, served = loading
    changes.answer(ModelLoaded(EPOCH, 0, INFO, 0.5), 1.0)
    changes.answer(second, 1.0)
    now, why = state(residency)
    assert (now, served) == ("draining", [])
    assert problem in why
    assert residency.turn(1.0) == [Unload("toy")]
    changes.command(Unload("toy"), EPOCH)
    for rank in range(2):
        changes.answer(ModelUnloaded(EPOCH, rank, "toy"), 2.0)
    assert state(residency)[0] == "absent"


def test_a_model_that_only_one_rank_brought_with_it_goes_first():
    residency = Residency(wait_s=60.0)
    residency.configure({"toy": 5, "other": 5}, 10)
    changes = Changes(residency, lambda info: None)
    changes.greet(2)
    changes.join(0, ("toy", "other"))
    changes.join(1, ("toy",))
    changes.begin(0.0)
    assert {s.name: s.state for s in residency.status()} == {"toy": "open", "other": "draining"}
