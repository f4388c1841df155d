"""Which models a server offers, what each gets of the memory, what is known of the others."""

import os

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import preflight, process, registry, servable
from nanogpt.config import ServeConfig, convert
from nanogpt.engine import check
from nanogpt.engine.descriptions import Descriptions
from nanogpt.engine.models import Models
from nanogpt.engine.plan import Planner
from nanogpt.engine.setup import GIB, models_budget
from nanogpt.engine.sizes import LEAST_CONTEXTS, Size, share
from nanogpt.errors import CheckpointError, ConfigError, StartupError
from nanogpt.ranks import Ranks
from tests.hf_models import TINY, write_model

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, 0, "", 0)
SIZES = st.lists(
    st.builds(Size, st.integers(1, 1000), st.integers(1, 100), st.integers(1, 64)),
    min_size=1,
    max_size=5,
)


@given(SIZES, st.integers(10, 5000), st.integers(1, 300))
def test_shares_fit_each_by_itself_and_are_even(sizes, memory, most):
    shares = share(memory, memory, sizes, most_contexts=most)
    contexts = []
    for size, each in zip(sizes, shares, strict=True):
        if each.blocks:
            assert each.bytes <= memory
            contexts.append(each.blocks / size.blocks_per_context)
            assert contexts[-1] <= most
            assert each.blocks >= size.blocks_per_context, "one context at the least"
        else:
            assert size.weights + size.context > memory, "it could have had one"


def test_with_room_for_all_all_are_there_at_once():
    sizes = [Size(100, 10, 4), Size(300, 20, 4)]
    shares = share(1000, 1000, sizes, most_contexts=256)
    assert [each.blocks for each in shares] == [80, 80]  # 20 contexts of each
    assert sum(each.bytes for each in shares) <= 1000


def test_without_room_for_all_each_has_a_few_contexts():
    sizes = [Size(600, 10, 4), Size(800, 10, 4)]
    shares = share(1000, 1000, sizes, most_contexts=256)
    assert [each.blocks for each in shares] == [4 * LEAST_CONTEXTS] * 2


def test_one_that_can_hardly_be_there_has_what_is_left():
    (small,) = share(125, 1000, [Size(100, 10, 4)], most_contexts=256)
    assert small.blocks == 10  # two and a half contexts
    (none,) = share(105, 1000, [Size(100, 10, 4)], most_contexts=256)
    assert none.blocks == 0


@pytest.fixture
def tiny(tmp_path):
    write_model(tmp_path / "tiny", **TINY)
    return tmp_path / "tiny"


def config_of(tiny, **residency) -> ServeConfig:
    models = ["shakespeare-char", f"tiny={tiny}"]
    return convert({"models": models, "device": "cpu", "residency": residency}, ServeConfig)


def planner(config: ServeConfig, tmp_path) -> Planner:
    budget = models_budget(config, ALONE, CPU)
    return Planner(config, CPU, tmp_path / "known", Models(config, ALONE, CPU).load, budget)


def test_it_begins_with_what_fits_pinned_ones_first(tiny, tmp_path):
    made = planner(config_of(tiny, memory_gib=1), tmp_path)
    assert made.plan(None, ()).begin_with == ("shakespeare-char", "tiny")
    assert [*made.infos] == ["shakespeare-char", "tiny", "shakespeare-deep"]
    first = planner(config_of(tiny, memory_gib=0.028), tmp_path)
    assert first.plan(None, ()).begin_with == ("shakespeare-char",)
    assert first.plan(None, ["tiny"]).begin_with == ("tiny",)
    assert first.plan(["tiny"], ()).begin_with == ("tiny",)
    assert sum(first.needs.values()) > first.budget >= max(first.needs.values())


def test_without_a_limit_it_begins_with_all_unless_an_operator_unloaded_some(tiny, tmp_path):
    made = planner(config_of(tiny), tmp_path)
    assert made.plan(None, ()).begin_with == ("shakespeare-char", "tiny")
    assert made.plan(["tiny"], ()).begin_with == ("tiny",)
    assert made.plan(["tiny"], ()).blocks == {}
    assert [*made.infos] == ["shakespeare-char", "tiny"]


def test_too_large_a_model_and_too_many_pinned_ones_are_refused_at_the_start(tiny, tmp_path):
    with pytest.raises(StartupError, match="'shakespeare-char' takes"):
        planner(config_of(tiny, memory_gib=0.02), tmp_path).plan(None, ())
    both = ["shakespeare-char", "tiny"]
    with pytest.raises(StartupError, match="pinned models"):
        planner(config_of(tiny, memory_gib=0.028, pinned=both), tmp_path).plan(None, ())
    with pytest.raises(ConfigError, match="'gpt5', which is not served"):
        planner(config_of(tiny, pinned=["gpt5"]), tmp_path)


def test_what_the_device_has_may_be_the_limit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "available_memory", lambda: 37_000_000)
    config = config_of(tiny, memory_gib="auto")
    made = planner(config, tmp_path)
    assert made.budget == 29_600_000
    assert made.plan(None, ()).begin_with == ("shakespeare-char",)  # the other comes when asked for
    assert [*made.infos] == ["shakespeare-char", "tiny"]
    assert models_budget(config, ALONE._replace(local_world_size=2), CPU) == made.budget // 2
    preflight.check_memory(config, [("tiny", str(tiny))], ranks=1)
    with pytest.raises(StartupError, match="weights of 'tiny'"):
        preflight.check_memory(config, [("tiny", str(tiny))], ranks=4000)


def test_preflight_compares_with_what_the_machine_has(tiny, monkeypatch):
    monkeypatch.setattr(process, "available_memory", lambda: GIB)
    sources = [("tiny", str(tiny))]
    preflight.check_memory(config_of(tiny, memory_gib=0.5), sources, ranks=2)
    with pytest.raises(StartupError, match=r"residency\.memory_gib is 0\.5 for each of 3 ranks"):
        preflight.check_memory(config_of(tiny, memory_gib=0.5), sources, ranks=3)
    with pytest.raises(StartupError, match="weights of 'tiny'"):
        preflight.check_memory(config_of(tiny, memory_gib=1e-4), sources, ranks=1)


def test_with_a_limit_known_models_whose_weights_are_here_are_offered_too(tiny, monkeypatch):
    config = convert({"models": [f"tiny={tiny}"], "device": "cpu"}, ServeConfig)
    assert [name for name, _ in servable.servable(config)] == ["tiny"]
    limited = convert({"models": [f"tiny={tiny}"], "residency": {"memory_gib": 1}}, ServeConfig)
    assert [name for name, _ in servable.servable(limited)][:1] == ["tiny"]
    assert "shakespeare-char" in dict(servable.servable(limited))


def test_a_vocabulary_that_can_not_be_had_is_told_at_the_start(tiny, tmp_path, monkeypatch, capsys):
    """The front end ended for want of it, again and again."""

    def missing():
        raise CheckpointError("GPT-2's vocabulary can't be downloaded")

    planner(config_of(tiny, memory_gib=1), tmp_path).plan(None, ())
    for name in ("vocab.json", "merges.txt"):
        (tiny / name).unlink()
    monkeypatch.setattr("nanogpt.tokenizer.gpt2_files", missing)
    with pytest.raises(CheckpointError, match="vocabulary"):
        Models(config_of(tiny), ALONE, CPU).load("tiny")
    with pytest.raises(CheckpointError, match="vocabulary"):
        planner(config_of(tiny, memory_gib=1), tmp_path).plan(None, ())
    assert check.main(["--model", f"tiny={tiny}"]) == 2  # before a reload ends what runs
    assert "GPT-2's vocabulary can't be downloaded" in capsys.readouterr().err


def test_what_a_card_says_of_unknown_characters_counts(tiny, tmp_path, monkeypatch):
    config, cards = config_of(tiny, memory_gib=1), registry.read_cards()
    made = planner(config, tmp_path)
    made.plan(None, ())
    assert made.infos["shakespeare-char"].tokenizer.unknown == ""
    mapped = msgspec.structs.replace(cards["shakespeare-char"], unknown="?")
    monkeypatch.setattr(registry, "read_cards", lambda: {**cards, "shakespeare-char": mapped})
    made = planner(config, tmp_path)
    made.plan(None, ())
    assert made.infos["shakespeare-char"].tokenizer.unknown == "?"


def test_weights_are_read_once_until_they_change(tiny, tmp_path):
    models = Models(config_of(tiny), ALONE, CPU)
    reads = []

    def find() -> str:
        known = Descriptions(tmp_path / "known")  # as another process would
        load = lambda: reads.append(1) or models.load("tiny")  # noqa: E731
        return known.find("tiny", str(tiny), "auto", load).info.fingerprint

    first = find()
    assert (find(), len(reads)) == (first, 1)
    os.utime(tiny / "model.safetensors", (1, 1))
    assert (find(), len(reads)) == (first, 2)
    (tmp_path / "known").write_bytes(b"{")
    assert (find(), len(reads)) == (first, 3)
