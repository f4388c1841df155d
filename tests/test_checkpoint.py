"""The checkpoint format: what is saved is what is loaded, and damage gives one clear error."""

import json
import os

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanogpt.errors import CheckpointError
from nanogpt.model import checkpoint
from nanogpt.model.gpt import GPT, CausalAttend, GPTConfig
from nanogpt.registry import TokenizerSpec

CHARACTERS = TokenizerSpec(kind="char", characters="\n ab'é")


def make_model(**changes):
    torch.manual_seed(0)
    shape = {"block_size": 8, "vocab_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}
    model = GPT(GPTConfig(**shape))
    model.init_weights()
    return model


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "c", make_model(), CHARACTERS, dtype=torch.float32)
    return tmp_path / "c"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(tmp_path, dtype, bias):
    model = make_model(bias=bias, activation="gelu_tanh")
    checkpoint.save(tmp_path / "c", model, CHARACTERS, dtype=dtype)
    loaded, tokenizer = checkpoint.load(tmp_path / "c", dtype)
    assert loaded.config == model.config
    assert tokenizer == CHARACTERS
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_same_logits_and_tied_head(saved):
    model, _ = checkpoint.load(saved)
    idx = torch.tensor([[0, 1, 2, 5]])
    assert torch.equal(model(idx, CausalAttend()), make_model()(idx, CausalAttend()))
    assert model.lm_head.weight is model.wte.weight
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_casts_to_the_wanted_dtype(saved):
    model, _ = checkpoint.load(saved, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_casts_by_what_the_file_has(saved):
    seen = []
    model, _ = checkpoint.load(saved, lambda stored: seen.append(stored) or torch.bfloat16)
    assert seen == [torch.float32]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_replaces_an_old_checkpoint_whole(saved):
    checkpoint.save(saved, make_model(n_layer=1), CHARACTERS, files={"README.md": b"# card\n"})
    assert checkpoint.load(saved)[0].config.n_layer == 1
    assert (saved / "README.md").read_bytes() == b"# card\n"
    assert os.listdir(saved.parent) == ["c"], "no temporary directories stay behind"


def test_a_failed_save_leaves_the_old_checkpoint(saved):
    broken = TokenizerSpec(kind="gpt2", directory="/nonexistent")
    with pytest.raises(OSError, match="nonexistent"):
        checkpoint.save(saved, make_model(n_layer=1), broken)
    assert checkpoint.load(saved)[0].config.n_layer == 2
    assert os.listdir(saved.parent) == ["c"]


def test_byte_pair_files_travel_with_the_model(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("#version: 0.2\n")
    spec = TokenizerSpec(kind="gpt2", directory=str(source))
    checkpoint.save(tmp_path / "own", make_model(), spec)
    checkpoint.save(tmp_path / "none", make_model(), TokenizerSpec(kind="gpt2"))
    assert (tmp_path / "own" / "merges.txt").read_text() == "#version: 0.2\n"
    own = TokenizerSpec(kind="gpt2", directory=str(tmp_path / "own"))
    assert checkpoint.read_config(tmp_path / "own")[1] == own
    assert checkpoint.read_config(tmp_path / "none")[1] == TokenizerSpec(kind="gpt2")


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def damage_shape(directory):
    config = json.loads((directory / "config.json").read_text())
    edit_config(directory, model={**config["model"], "n_embd": 32})


def damage_names(directory):
    weights = load_file(directory / "model.safetensors")
    weights["h.0.attn.bias"] = torch.zeros(1)
    save_file(weights, directory / "model.safetensors")


def truncate(directory):
    size = os.path.getsize(directory / "model.safetensors")
    os.truncate(directory / "model.safetensors", size // 2)


DAMAGE = {
    "no directory": (lambda d: d.rename(d.with_name("gone")), "config.json: No such file"),
    "no config": (lambda d: (d / "config.json").unlink(), "can't read .*config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "can't read .*safetensors"),
    "no characters": (lambda d: (d / "characters.json").unlink(), "can't read .*characters"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not a nanogpt"),
    "other format": (lambda d: edit_config(d, format="gguf"), "Invalid enum value 'gguf'"),
    "from the future": (lambda d: edit_config(d, version=9), "version 9.*update"),
    "unknown field": (lambda d: edit_config(d, model={"n_layers": 2}), "unknown field `n_layers`"),
    "heads": (lambda d: edit_config(d, model={"n_head": 5}), "n_embd 768 is not a multiple"),
    "other shape": (damage_shape, r"wte.weight is \(6, 16\), but .* \(6, 32\)"),
    "unknown tensor": (damage_names, "has an unknown h.0.attn.bias"),
    "truncated": (truncate, "can't read .*model.safetensors"),
    "characters not unique": (
        lambda d: (d / "characters.json").write_text('["a", "a"]'),
        "one character, once",
    ),
    "too many characters": (
        lambda d: (d / "characters.json").write_bytes(msgspec.json.encode(list("abcdefg"))),
        "has 7 characters, but the model knows 6",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line(saved, kind):
    damage, message = DAMAGE[kind]
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_missing_layer_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    edit_config(saved, model={**config["model"], "n_layer": 3})
    with pytest.raises(CheckpointError, match=r"lacks h\.2\."):
        checkpoint.load(saved)
