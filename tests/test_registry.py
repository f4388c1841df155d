"""Names of models: cards, aliases, paths, and what is said of a name that nobody knows."""

import pytest

from nanogpt import registry
from nanogpt.config import PROJECT
from nanogpt.errors import ConfigError
from nanogpt.model import checkpoint
from nanogpt.registry import ModelCard

CARD = """
name = "small"
hub = "someone/small"
aliases = ["tiny", "someone/small"]
tokenizer = "gpt2"
context = 128
licence = "MIT"
"""


@pytest.fixture
def cards(tmp_path):
    (tmp_path / "small.toml").write_text(CARD)
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ndirectory = "nanogpt"\ntokenizer = "char"\ncontext = 8\nlicence = "CC0-1.0"'
    )
    (tmp_path / "later.toml").write_text(
        'name = "later"\ndirectory = "out/nowhere"\nrecipe = "configs/train/later.toml"\n'
        'tokenizer = "char"\ncontext = 8\nlicence = "CC0-1.0"'
    )
    return registry.read_cards(tmp_path)


def test_names_and_aliases(cards):
    assert registry.resolve("small", cards) == ("small", "someone/small")
    assert registry.resolve("tiny", cards) == ("small", "someone/small")
    assert registry.resolve("mine", cards) == ("mine", str(PROJECT / "nanogpt"))


def test_paths(cards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ckpt.pt").touch()
    for given in ("ckpt.pt", "~/ckpt.pt", f"{tmp_path}/ckpt.pt"):
        assert registry.resolve(f"small={given}", cards) == ("small", str(tmp_path / "ckpt.pt"))
    assert registry.resolve(" a = gpt2-xl ", cards) == ("a", "gpt2-xl")
    assert registry.resolve("a=x=y", cards) == ("a", "x=y")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("smal", r"unknown model 'smal'; did you mean 'small'\?"),
        ("tinny", r"did you mean 'tiny'\?"),
        ("zzz", r"unknown model 'zzz' \(known are later, mine, small; any other .* NAME=PATH\)"),
        ("/", "'/' is a path: give it a name"),
        ("a=", "no path after the equals sign"),
        ("=x", "use 1 to 128 letters"),
        ("a b=x", "use 1 to 128 letters"),
        ("a//b=x", "use 1 to 128 letters"),
        ("é=x", "use 1 to 128 letters"),
        ("a" * 129 + "=x", "use 1 to 128 letters"),
        ("later", r"is not there; train it: python -m nanogpt\.train --config configs/train/later"),
    ],
)
def test_what_is_wrong_with_a_name(cards, model, said):
    with pytest.raises(ConfigError, match=said) as error:
        registry.resolve(model, cards)
    assert len(str(error.value)) < 400


def test_a_name_given_twice():
    with pytest.raises(ConfigError, match="'a' is given twice"):
        registry.sources(["a=x", "gpt2", "a=y"])


def test_served_aliases(cards):
    assert registry.aliases(["small", "mine"], cards) == {"tiny": "small", "someone/small": "small"}
    assert registry.aliases(["small", "tiny"], cards) == {"someone/small": "small"}
    assert registry.aliases(["tiny"], cards) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + 'directory = "x"', "from `hub` or from `directory`"),
        (lambda text: text.replace('hub = "someone/small"', ""), "from `hub` or from `directory`"),
        (lambda text: text + "contxt = 3", r"unknown key 'contxt'; did you mean 'context'\?"),
        (lambda text: text.replace("128", '"long"'), "context"),
        (lambda text: text.replace('"gpt2"', '"words"'), "tokenizer"),
        (lambda text: text + "=", "not valid TOML"),
    ],
)
def test_bad_cards(tmp_path, change, said):
    (tmp_path / "small.toml").write_text(change(CARD))
    with pytest.raises(ConfigError, match=said) as error:
        registry.read_cards(tmp_path)
    assert "small.toml" in str(error.value)


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_names_taken_by_two_cards(tmp_path, name):
    (tmp_path / "small.toml").write_text(CARD)
    other = (
        CARD.replace("tiny", "x").replace("someone/small", "y/z").replace('"small"', f'"{name}"')
    )
    (tmp_path / "other.toml").write_text(other)
    with pytest.raises(ConfigError, match=f"both have a model '{name}'"):
        registry.read_cards(tmp_path)


SHIPPED = registry.read_cards()


def test_the_shipped_cards():
    assert {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "shakespeare-char"} <= SHIPPED.keys()
    assert all((registry.CARDS / f"{name}.toml").exists() for name in SHIPPED)
    assert all((PROJECT / c.recipe).exists() for c in SHIPPED.values() if c.recipe)


@pytest.mark.parametrize("card", [c for c in SHIPPED.values() if c.directory], ids=lambda c: c.name)
def test_cards_of_what_is_here_tell_the_truth(card: ModelCard):
    directory = PROJECT / card.directory
    if not directory.exists():
        pytest.skip(f"{card.name} is not trained here")
    config, tokenizer = checkpoint.read_config(directory)
    assert (card.context, card.tokenizer) == (config.block_size, tokenizer.kind)
