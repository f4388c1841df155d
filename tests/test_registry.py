"""Names of models: cards, aliases, paths, and what is said of a name that nobody knows."""

import pytest
from safetensors.torch import load_file

from nanogpt import registry
from nanogpt.config import PROJECT
from nanogpt.errors import ConfigError
from nanogpt.model import checkpoint
from nanogpt.registry import ModelCard
from nanogpt.train import config

CARD = """
name = "small"
hub = "someone/small"
aliases = ["tiny", "someone/small"]
tokenizer = "gpt2"
context = 128
dtype = "float32"
licence = "MIT"
shape = {n_layer = 2, n_head = 2, n_embd = 16, vocab_size = 50257}
"""
CHARACTERS = """
tokenizer = "char"
context = 8
dtype = "float16"
licence = "CC0-1.0"
shape = {n_layer = 2, n_head = 2, n_embd = 16, vocab_size = 65, bias = false}
"""


@pytest.fixture
def cards(tmp_path):
    (tmp_path / "small.toml").write_text(CARD)
    (tmp_path / "mine.toml").write_text(
        f'name = "mine"\ndirectory = "nanogpt"\nunknown = "?"\n{CHARACTERS}'
    )
    (tmp_path / "later.toml").write_text(
        'name = "later"\ndirectory = "out/nowhere"\nrecipe = "configs/train/later.toml"\n'
        f"{CHARACTERS}"
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
        ("later", r"is not there; get it with: nanogpt prepare char && nanogpt train"),
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
        (lambda text: text + 'unknown = "?"', "for a tokenizer of characters"),
        (lambda text: text.replace('"float32"', '"int4"'), "dtype"),
        (lambda text: text.replace("n_head = 2, ", ""), "n_head"),
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
    assert SHIPPED.keys() == {
        *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
        *("shakespeare-char", "shakespeare-finetune", "shakespeare-deep"),
    }
    assert all((registry.CARDS / f"{name}.toml").exists() for name in SHIPPED)
    assert all((PROJECT / c.recipe).exists() for c in SHIPPED.values() if c.recipe)


@pytest.mark.parametrize("card", [c for c in SHIPPED.values() if c.recipe], ids=lambda c: c.name)
def test_cards_and_recipes_agree(card: ModelCard):
    recipe = config.load(str(PROJECT / card.recipe))
    if not card.directory.startswith("nanogpt/"):
        assert card.directory == f"{recipe.out}/best"
    assert not card.base or card.base == recipe.init_from
    assert recipe.data.endswith("_char" if card.tokenizer == "char" else "_bpe")
    shape, like = card.shape, recipe.model
    if like is None:
        assert shape == SHIPPED[recipe.init_from].shape
        return
    assert (shape.n_layer, shape.n_head, shape.n_embd) == (like.n_layer, like.n_head, like.n_embd)
    assert (shape.bias, card.context) == (like.bias, like.block_size)


@pytest.mark.parametrize("card", [c for c in SHIPPED.values() if c.directory], ids=lambda c: c.name)
def test_cards_of_what_is_here_tell_the_truth(card: ModelCard):
    directory = PROJECT / card.directory
    if not directory.exists():
        pytest.skip(f"{card.name} is not trained here")
    shape, tokenizer = checkpoint.read_config(directory)
    assert (card.context, card.tokenizer) == (shape.block_size, tokenizer.kind)
    assert all(getattr(card.shape, f) == getattr(shape, f) for f in card.shape.__struct_fields__)
    weights = load_file(directory / checkpoint.WEIGHTS).values()
    assert {str(tensor.dtype) for tensor in weights} == {f"torch.{card.dtype}"}
    assert sum(tensor.numel() for tensor in weights) == card.parameters


def test_how_to_get_what_is_not_here():
    assert SHIPPED["gpt2"].command == "nanogpt fetch gpt2"
    assert SHIPPED["shakespeare-deep"].command == (
        "nanogpt prepare char && nanogpt train --config configs/train/shakespeare_deep.toml"
    )
    assert SHIPPED["shakespeare-finetune"].command == (
        "nanogpt fetch gpt2 && nanogpt prepare bpe --tokenizer-of gpt2 && "
        "nanogpt train --config configs/train/shakespeare_finetune.toml"
    )
    assert registry.unknown_character("gpt2", SHIPPED) == ""


def test_the_character_for_all_others(cards):
    assert registry.unknown_character("mine", cards) == "?"
    assert registry.unknown_character("nobody", cards) == ""


def test_whether_weights_are_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert SHIPPED["gpt2"].modified is None
    assert SHIPPED["shakespeare-char"].modified is not None
    place = tmp_path / "models--gpt2"  # its name once
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("c0ffee")
    (place / "snapshots/c0ffee").mkdir(parents=True)
    (place / "snapshots/c0ffee/config.json").write_text("{}")
    assert SHIPPED["gpt2"].modified is None
    (place / "snapshots/c0ffee/model.safetensors").write_text("weights")
    assert SHIPPED["gpt2"].modified is not None
