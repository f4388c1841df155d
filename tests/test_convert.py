"""Every source of weights: the same logits as transformers', and damage in one clear line."""

import json
import os
import pickle
import shutil
import weakref
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt import registry
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import bit_sums
from nanogpt.errors import CheckpointError
from nanogpt.model import checkpoint, convert
from nanogpt.model.assemble import assemble
from nanogpt.model.dtypes import as_stored
from nanogpt.model.fingerprint import fingerprint
from nanogpt.model.gpt import GPT, CausalAttend, GPTConfig
from nanogpt.model.load import LoadedModel, load_model
from nanogpt.model.nanogpt_writer import write_nanogpt
from nanogpt.registry import TokenizerSpec
from nanogpt.tokenizer import load_tokenizer
from tests.hf_models import TINY, random_model, write_model

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
IDS = torch.tensor([[3, 50256, 17, 40000, 5, 5, 900, 0]])
CHARACTERS = "\n !abc'é😀"


def load(source, dtype=torch.float32):
    return load_model(str(source), "tiny", dtype=dtype, device="cpu")


@torch.inference_mode()
def assert_same(loaded, theirs, ids=IDS):
    expected = theirs(ids).logits
    ours = loaded.model(ids, CausalAttend())[..., : expected.shape[-1]]
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory as transformers writes it today, and the model in it."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    return directory, write_model(directory, **TINY)


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


def state_of(directory):
    return load_file(directory / "model.safetensors")


def rewrite(directory, state):
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def as_hub_has_it(state):
    """OpenAI's models on the hub: no prefix, and causal masks among the weights."""
    plain = {name.removeprefix("transformer."): t for name, t in state.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    return plain | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}


class TestHuggingFace:
    def test_logits_and_what_is_known_of_it(self, written):
        directory, theirs = written
        loaded = load(directory)
        assert_same(loaded, theirs)
        assert not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert loaded.model.lm_head.weight is loaded.model.wte.weight
        info = loaded.info
        assert (info.name, info.dtype, info.context_length) == ("tiny", "float32", 32)
        assert (info.vocab_size, info.eos_token_id, info.start_token_id) == (50257, 50256, 50256)
        assert info.num_parameters == theirs.num_parameters()
        assert info.created == int((directory / "model.safetensors").stat().st_mtime)
        assert load_tokenizer(info.tokenizer).encode("a<|endoftext|>") == [64, 50256]

    def test_as_the_hub_has_it(self, copy, written):
        rewrite(copy, as_hub_has_it(state_of(copy)))
        assert_same(load(copy), written[1])

    def test_parts(self, copy, written):
        (copy / "model.safetensors").unlink()
        written[1].save_pretrained(copy, max_shard_size="40KB")
        assert len(list(copy.glob("model-*.safetensors"))) > 1
        assert_same(load(copy), written[1])

    def test_pytorch_file(self, copy, written):
        """With the tied head in it, as transformers wrote it."""
        (copy / "model.safetensors").unlink()
        torch.save(written[1].state_dict(), copy / "pytorch_model.bin")
        assert_same(load(copy), written[1])

    def test_pytorch_file_in_parts(self, copy, written):
        (copy / "model.safetensors").unlink()
        state, places = written[1].state_dict(), {}
        for part in (0, 1):
            file = f"pytorch_model-{part}.bin"
            names = [n for n in state if (".h.1." in n) == bool(part)]
            torch.save({n: state[n] for n in names}, copy / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": places}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert_same(load(copy), written[1])

    @pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
    def test_dtypes(self, copy, stored, wanted):
        state = {n: t.to(stored) for n, t in state_of(copy).items()}
        rewrite(copy, state)
        model = load(copy, wanted).model
        assert {p.dtype for p in model.parameters()} == {wanted}
        assert all(p.is_contiguous() for p in model.parameters())
        expected = state["transformer.h.1.mlp.c_fc.weight"].to(wanted).t()
        assert torch.equal(model.h[1].mlp.c_fc.weight, expected)

    @pytest.mark.parametrize("stored", [torch.float16, torch.float32])
    def test_dtype_by_what_the_file_has(self, copy, stored):
        rewrite(copy, {n: t.to(stored) for n, t in state_of(copy).items()})
        loaded = load(copy, lambda found: torch.float16 if found == stored else torch.bfloat16)
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}
        assert loaded.info.dtype == "float16"

    @pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
    def test_activations(self, tmp_path, activation):
        theirs = write_model(tmp_path / "m", activation_function=activation, **TINY)
        assert_same(load(tmp_path / "m"), theirs)

    def test_memory_of_its_own(self, copy):
        """The file may be written over while the model is in use, as training does it."""
        model = load(copy).model
        before = {n: p.clone() for n, p in model.named_parameters()}
        with open(copy / "model.safetensors", "r+b") as file:
            file.seek(-20000, os.SEEK_END)
            file.write(b"\0" * 20000)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    def test_without_a_tokenizer_it_is_gpt2s(self, copy):
        (copy / "vocab.json").unlink()
        (copy / "merges.txt").unlink()
        info = load(copy).info
        assert info.tokenizer == TokenizerSpec(kind="gpt2")
        assert (info.vocab_size, info.eos_token_id) == (50257, 50256)

    def test_padding_is_not_in_the_vocabulary(self, tmp_path):
        write_model(tmp_path / "m", vocab_size=50304, **TINY)
        loaded = load(tmp_path / "m")
        assert (loaded.info.vocab_size, loaded.model.config.vocab_size) == (50257, 50304)

    def test_fewer_rows_than_ids(self, tmp_path):
        write_model(tmp_path / "m", vocab_size=50256, **TINY)
        with pytest.raises(CheckpointError, match="has 50257 ids, the model 50256"):
            load(tmp_path / "m")

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("model_type", "llama"),
            ("activation_function", "relu"),
            ("n_inner", 100),
            ("scale_attn_weights", False),
            ("scale_attn_by_inverse_layer_idx", True),
            ("reorder_and_upcast_attn", True),
            ("add_cross_attention", True),
            ("layer_norm_epsilon", 1e-6),
            ("quantization_config", {"bits": 4}),
        ],
    )
    def test_options_that_are_not_supported(self, copy, option, value):
        self.configure(copy, option, value)
        with pytest.raises(
            CheckpointError, match=rf"config\.json.*{option}.*only|{option} = .*not"
        ):
            load(copy)

    @pytest.mark.parametrize(
        ("option", "value"), [("n_head", 3), ("n_layer", "x"), ("n_embd", None)]
    )
    def test_numbers_that_make_no_network(self, copy, option, value):
        self.configure(copy, option, value)
        with pytest.raises(CheckpointError, match=rf"config\.json.*{option}"):
            load(copy)

    @staticmethod
    def configure(directory, option, value):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {option: value}))

    def test_vocabulary_that_is_not_gpt2s_without_a_tokenizer(self, tmp_path):
        write_model(tmp_path / "m", vocab_size=500, **TINY)
        (tmp_path / "m" / "vocab.json").unlink()
        with pytest.raises(CheckpointError, match="a vocabulary of 500 is not GPT-2's"):
            load(tmp_path / "m")


HEAD = "transformer.ln_f.weight"
TENSORS = {
    "missing": (lambda s: s.pop(HEAD), r"lacks the tensor ln_f\.weight"),
    "extra": (lambda s: s.update(score=torch.zeros(2)), "a tensor score that is not one"),
    "shape": (lambda s: s.update({HEAD: torch.zeros(15)}), r"ln_f\.weight is \(15,\).*\(16,\)"),
    "layers": (lambda s: s.update({"h.2.ln_1.bias": torch.zeros(16)}), r"h\.2\.ln_1\.bias that"),
    "ints": (lambda s: s.update({HEAD: torch.ones(16).to(torch.int8)}), "quantised"),
    "twice": (lambda s: s.update({"ln_f.weight": torch.zeros(16)}), r"ln_f\.weight twice"),
    "untied": (
        lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"] + 1}),
        r"lm_head\.weight differs from wte\.weight",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(copy, what):
    change, message = TENSORS[what]
    state = state_of(copy)
    change(state)
    rewrite(copy, state)
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-executed",)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def replace_weights(directory, name, write):
    (directory / "model.safetensors").unlink()
    write(directory / name)


def index_of(part):
    return lambda path: path.write_text(json.dumps({"weight_map": {"wte.weight": part}}))


FILES = {
    "cut off": (lambda d: truncate(d / "model.safetensors"), r"can't read .*model\.safetensors"),
    "none": (lambda d: (d / "model.safetensors").unlink(), "has no weights: one of model"),
    "no config": (lambda d: (d / "config.json").unlink(), r"can't read .*config\.json"),
    "bad config": (lambda d: (d / "config.json").write_text("{"), r"config\.json"),
    "code": (
        lambda d: replace_weights(d, "pytorch_model.bin", lambda p: torch.save({"a": Evil()}, p)),
        "more than tensors and plain values",
    ),
    "old format": (
        lambda d: replace_weights(
            d,
            "pytorch_model.bin",
            lambda p: torch.save({}, p, _use_new_zipfile_serialization=False),
        ),
        "not of torch.save's zip format",
    ),
    "a list": (
        lambda d: replace_weights(d, "pytorch_model.bin", lambda p: torch.save([1], p)),
        "not a state dict",
    ),
    "escape": (
        lambda d: replace_weights(d, "model.safetensors.index.json", index_of("../x.safetensors")),
        "not a file beside it",
    ),
    "no part": (
        lambda d: replace_weights(d, "model.safetensors.index.json", index_of("x.safetensors")),
        r"can't read .*x\.safetensors",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_do_not_fit(copy, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    damage, message = FILES[what]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy)
    assert "\n" not in str(error.value)
    assert not Path("was-executed").exists()


def nanogpt_state(theirs, prefix="", with_masks=False):
    """transformers' weights under nanoGPT's names, (out, in), without the biases."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("bias"):
            continue
        is_conv = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        state[prefix + name] = tensor.t().contiguous() if is_conv else tensor
    if with_masks:
        state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in (0, 1)}
    return state


@pytest.fixture
def nanogpt(tmp_path):
    """Writes nanoGPT's ckpt.pt: exact GELU, no biases; returns transformers' model of the same."""

    def write(vocab_size=50304, config=None, file="out/ckpt.pt", args=None, **state):
        theirs = random_model(vocab_size=vocab_size, activation_function="gelu", **TINY)
        for name, param in theirs.named_parameters():
            if name.endswith("bias"):
                param.data.zero_()
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32}
        saved = {
            "model": nanogpt_state(theirs, **state),
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
            "model_args": {**shape, "bias": False, "vocab_size": vocab_size, "dropout": 0.2}
            | (args or {}),
            "iter_num": 250,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "chars", "dtype": "bfloat16"} | (config or {}),
        }
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(saved, path)
        return path, theirs

    return write


def write_meta(path, characters=CHARACTERS):
    path.parent.mkdir(parents=True, exist_ok=True)
    stoi = {c: i for i, c in enumerate(characters)}
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    path.write_bytes(pickle.dumps(meta))


class TestNanoGPT:
    @pytest.mark.parametrize("prefix", ["", "_orig_mod."])
    @pytest.mark.parametrize("with_masks", [False, True])
    def test_same_logits_with_exact_gelu_and_padding(self, nanogpt, prefix, with_masks):
        path, theirs = nanogpt(prefix=prefix, with_masks=with_masks)
        loaded = load(path)
        assert_same(loaded, theirs)
        assert loaded.model.config.activation == "gelu"
        assert not loaded.model.config.bias
        assert loaded.model.config.vocab_size == 50304
        assert (loaded.info.vocab_size, loaded.info.eos_token_id) == (50257, 50256)
        assert loaded.info.tokenizer == TokenizerSpec(kind="gpt2")

    @pytest.mark.parametrize("meta", ["out/meta.pkl", "data/chars/meta.pkl"])
    def test_characters(self, nanogpt, tmp_path, meta):
        """Beside the checkpoint, or where nanoGPT itself has it."""
        path, theirs = nanogpt(vocab_size=len(CHARACTERS))
        write_meta(tmp_path / meta)
        loaded = load(path)
        assert_same(loaded, theirs, torch.tensor([[1, 2, 3, 8]]))
        assert loaded.info.tokenizer == TokenizerSpec(kind="char", characters=CHARACTERS)
        assert loaded.info.vocab_size == len(CHARACTERS)
        assert (loaded.info.eos_token_id, loaded.info.start_token_id) == (None, 0)

    def test_characters_without_their_table(self, nanogpt):
        path, _ = nanogpt(vocab_size=9)
        with pytest.raises(CheckpointError, match=r"put the dataset's meta\.pkl beside it"):
            load(path)

    def test_a_table_of_another_size(self, nanogpt, tmp_path):
        path, _ = nanogpt(vocab_size=9)
        write_meta(tmp_path / "out/meta.pkl", "ab")
        with pytest.raises(CheckpointError, match=r"2 characters, but .* 9 rows"):
            load(path)

    def test_dataset_never_leaves_the_data_directory(self, nanogpt, tmp_path):
        path, _ = nanogpt(vocab_size=9, config={"dataset": "../elsewhere"})
        write_meta(tmp_path / "elsewhere/meta.pkl")
        with pytest.raises(CheckpointError, match=r"meta\.pkl beside it"):
            load(path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (pickle.dumps({"itos": {0: "a"}, "x": Evil()}), "it asks for posix.mkdir"),
            (pickle.dumps({"itos": {0: "a", 2: "b"}}), "one character for each id"),
            (pickle.dumps({"itos": {0: "a", 1: "a"}}), "one character for each id"),
            (pickle.dumps({"itos": {0: "ab"}}), "one character for each id"),
            (pickle.dumps(["a"]), "not nanoGPT's table"),
            (b"\x80\x04", "can't read"),
            (b"", "can't read"),
        ],
    )
    def test_bad_tables(self, nanogpt, tmp_path, monkeypatch, content, said):
        monkeypatch.chdir(tmp_path)
        path, _ = nanogpt(vocab_size=9)
        path.with_name("meta.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            load(path)
        assert not Path("was-executed").exists()

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"n_layer": 3}, r"lacks the tensor h\.2"),
            ({"bias": True}, "lacks the tensor"),
            ({"block_size": 64}, r"wpe\.weight is \(32, 16\).*\(64, 16\)"),
            ({"n_head": 5}, "n_embd 16 is not a multiple of n_head 5"),
            ({"n_embd": "wide"}, "n_embd"),
        ],
    )
    def test_arguments_that_do_not_fit(self, nanogpt, args, said):
        path, _ = nanogpt(args=args)
        with pytest.raises(CheckpointError, match=said):
            load(path)

    @pytest.mark.parametrize("saved", [{}, {"model": {}}, [], {"model": 1, "model_args": 2}])
    def test_files_of_other_programs(self, tmp_path, saved):
        torch.save(saved, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            load(tmp_path / "x.pt")

    def test_code_is_not_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({"model": Evil(), "model_args": {}}, "x.pt")
        with pytest.raises(CheckpointError, match="more than tensors and plain values"):
            load("x.pt")
        assert not Path("was-executed").exists()

    def test_cut_off(self, nanogpt):
        path, _ = nanogpt()
        truncate(path)
        with pytest.raises(CheckpointError, match="cut off"):
            load(path)


class TestFingerprint:
    def test_one_for_all_formats(self, written, tmp_path):
        loaded = load(written[0])
        convert.write_ours(loaded, tmp_path / "ours")
        convert.write_hugging_face(loaded, tmp_path / "hf")
        assert load(tmp_path / "ours").info.fingerprint == loaded.info.fingerprint
        assert load(tmp_path / "hf").info.fingerprint == loaded.info.fingerprint

    @needs_kernels
    @pytest.mark.parametrize("dtype", convert.DTYPES.values())
    def test_one_for_views_of_a_file_as_well(self, written, tmp_path, dtype):
        """Whoever packs the matrices gets them as they lie in the file: the same weights, and of
        what is not packed a copy."""
        convert.write_hugging_face(load(written[0], dtype), tmp_path / "hf")
        loaded = load(tmp_path / "hf", dtype)
        views = load_model(
            str(tmp_path / "hf"), "tiny", dtype=dtype, device="cpu", packing=bit_sums
        )
        assert views.info == loaded.info
        state = views.model.state_dict()
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(state[name], tensor), name
            is_matrix = tensor.dim() == 2 and name.startswith("h.")
            assert state[name].is_contiguous() != is_matrix, name

    def test_int8_counts(self, written):
        plain, int8 = (
            load_model(str(written[0]), "m", dtype=torch.float32, device="cpu", int8=int8).info
            for int8 in (False, True)
        )
        assert (plain.dtype, int8.dtype) == ("float32", "int8")
        assert plain.fingerprint != int8.fingerprint

    def test_dtype_counts(self, written):
        found = {load(written[0], d).info.fingerprint for d in convert.DTYPES.values()}
        assert len(found) == 3

    @pytest.mark.parametrize("dtype", convert.DTYPES.values())
    @pytest.mark.parametrize("n_embd", [16, 10, 3])
    def test_the_least_change_of_any_weight_shows(self, dtype, n_embd):
        """Widths that are and are not multiples of the words that are summed."""
        torch.manual_seed(0)
        shape = {"n_layer": 1, "n_head": 1, "n_embd": n_embd, "block_size": 3, "vocab_size": 5}
        model = GPT(GPTConfig(**shape)).to(dtype)
        model.init_weights()
        before = fingerprint(model)
        for name, param in model.named_parameters():
            flat = param.detach().view(-1)
            for at in (0, len(flat) // 2, len(flat) - 1):
                was = flat[at].item()
                flat[at] = torch.nextafter(flat[at], torch.tensor(9.0, dtype=dtype))
                assert fingerprint(model) != before, f"{name}[{at}]"
                flat[at] = was
        assert fingerprint(model) == before

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_order_counts(self, dim, width):
        """Neighbours of one, two and four weights change places, in one column or one row."""
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=8))
        model.init_weights()
        before, wte = fingerprint(model), model.wte.weight.data
        here = wte[:1, :width]
        there = wte[1:2, :width] if dim == 0 else wte[:1, width : 2 * width]
        kept = here.clone()
        here.copy_(there)
        there.copy_(kept)
        assert fingerprint(model) != before

    def test_the_activation_counts(self):
        torch.manual_seed(0)
        shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4, "vocab_size": 4}
        a, b = (GPT(GPTConfig(activation=x, **shape)) for x in ("gelu", "gelu_tanh"))
        a.init_weights()
        b.load_state_dict(a.state_dict())
        assert fingerprint(a) != fingerprint(b)


def test_no_more_than_one_tensor_beyond_the_model():
    """The tensors of a file are let go one by one."""
    config = GPTConfig(n_layer=3, n_head=1, n_embd=8, block_size=4, vocab_size=8)
    alive: list[weakref.ref] = []
    most = 0

    def reader(shape):
        def read():
            nonlocal most
            tensor = torch.zeros(shape)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

        return read

    shapes = {n: p.shape for n, p in GPT(config).named_parameters()}
    readers = {name: reader(shape) for name, shape in shapes.items()}
    model = assemble("here", config, readers, torch.float16, "cpu")
    assert len(alive) == len(shapes)
    assert most <= 2  # the old one while the new one is made
    assert model.wte.weight.dtype == torch.float16


def test_a_character_for_unknown_ones(nanogpt, tmp_path, written):
    path, _ = nanogpt(vocab_size=len(CHARACTERS))
    write_meta(tmp_path / "out/meta.pkl")
    options = {"dtype": torch.float32, "device": "cpu"}
    loaded = load_model(str(path), "m", unknown="!", **options)
    assert load_tokenizer(loaded.info.tokenizer).encode("aZ!") == [3, 2, 2]
    for source, unknown in ((path, "?"), (written[0], "!")):
        with pytest.raises(CheckpointError, match="can't stand for unknown characters"):
            load_model(str(source), "m", unknown=unknown, **options)


class TestWriting:
    def test_ours(self, written, tmp_path):
        directory, theirs = written
        assert convert.main([str(directory), str(tmp_path / "o"), "--dtype", "float32"]) == 0
        loaded = load(tmp_path / "o")
        assert_same(loaded, theirs)
        assert loaded.info.tokenizer == TokenizerSpec(kind="gpt2", directory=str(tmp_path / "o"))
        assert (tmp_path / "o" / "merges.txt").read_bytes() == (
            directory / "merges.txt"
        ).read_bytes()
        ours, old = (
            json.loads((d / "vocab.json").read_text()) for d in (tmp_path / "o", directory)
        )
        assert ours == old

    def test_for_transformers(self, written, tmp_path):
        directory, theirs = written
        out = tmp_path / "hf"
        assert convert.main([str(directory), str(out), "--dtype", "float32", "--to", "hf"]) == 0
        again = AutoModelForCausalLM.from_pretrained(out)
        with torch.inference_mode():
            assert torch.equal(again(IDS).logits, theirs(IDS).logits)
        tokenizer = AutoTokenizer.from_pretrained(out)
        text = "Hello,  world<|endoftext|>\n"
        assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(directory).encode(text)

    def test_characters_for_transformers(self, nanogpt, tmp_path):
        """A model without biases, with exact GELU, and each character a token."""
        path, _ = nanogpt(vocab_size=len(CHARACTERS))
        write_meta(tmp_path / "out/meta.pkl")
        assert (
            convert.main([str(path), str(tmp_path / "hf"), "--dtype", "float32", "--to", "hf"]) == 0
        )
        text = "a b'é\n😀!"
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
        loaded = load(path)
        ids = load_tokenizer(loaded.info.tokenizer).encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert_same(loaded, theirs, torch.tensor([ids]))

    def test_padding_stays_out_of_transformers(self, nanogpt, tmp_path, written):
        path, _ = nanogpt()
        loaded = load(path)
        spec = TokenizerSpec(kind="gpt2", directory=str(written[0]))
        info = msgspec.structs.replace(loaded.info, tokenizer=spec)
        convert.write_hugging_face(LoadedModel(loaded.model, info), tmp_path / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert theirs.config.vocab_size == 50257
        assert_same(loaded, theirs)

    def test_added_tokens_survive(self, copy, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(copy)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        (copy / "vocab.json").unlink()
        tokenizer.save_pretrained(copy)
        state = state_of(copy)
        row = torch.zeros(1, 16)
        state["transformer.wte.weight"] = torch.cat([state["transformer.wte.weight"], row])
        rewrite(copy, state)
        TestHuggingFace.configure(copy, "vocab_size", 50258)
        loaded = load(copy)
        assert loaded.info.vocab_size == 50258
        convert.write_ours(loaded, tmp_path / "ours")
        again = load(tmp_path / "ours")
        assert again.info.vocab_size == 50258
        assert load_tokenizer(again.info.tokenizer).encode("[PAD]") == [50257]
        convert.write_hugging_face(loaded, tmp_path / "hf")
        assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("a[PAD]") == [64, 50257]

    @pytest.mark.parametrize("to", convert.WRITERS)
    def test_nothing_is_overwritten(self, written, tmp_path, capsys, to):
        (tmp_path / "mine").write_text("x")
        assert convert.main([str(written[0]), str(tmp_path), "--to", to]) == 2
        assert "is there already" in capsys.readouterr().err
        assert [f.name for f in tmp_path.iterdir()] == ["mine"]

    def test_the_widest_type_speaks_for_all(self, copy, tmp_path):
        """Nothing of a float32 LayerNorm is lost beside float16 matrices."""
        state = {n: t.half() if t.dim() == 2 else t for n, t in state_of(copy).items()}
        rewrite(copy, state)
        assert convert.main([str(copy), str(tmp_path / "a")]) == 0
        assert convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hf"]) == 0
        again = state_of(tmp_path / "b")
        assert all(torch.equal(again[n], t.float()) for n, t in state.items() if n in again)
        assert again.keys() >= {n for n in state if "lm_head" not in n}

    @pytest.mark.parametrize("bias", [False, True])
    def test_there_and_back_to_nanogpt(self, tmp_path, bias):
        """Ours, nanoGPT's, Hugging Face's and ours again: not a bit is lost."""
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": bias}
        model = GPT(GPTConfig(vocab_size=len(CHARACTERS), **shape))
        model.init_weights()
        for param in model.parameters():
            param.data += torch.randn_like(param)
        spec = TokenizerSpec(kind="char", characters=CHARACTERS)
        checkpoint.save(tmp_path / "a", model, spec, dtype=torch.bfloat16)
        first = load(tmp_path / "a", as_stored)
        for source, to in (("a", "nanogpt"), ("b/ckpt.pt", "hf"), ("b/ckpt.pt", "ours")):
            out = {"nanogpt": "b", "hf": "c", "ours": "d"}[to]
            assert convert.main([str(tmp_path / source), str(tmp_path / out), "--to", to]) == 0
        for there in ("b/ckpt.pt", "d"):
            again = load(tmp_path / there, as_stored)
            assert again.info.tokenizer == spec
            assert again.info.fingerprint == first.info.fingerprint  # of every bit
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
        ids = torch.tensor([[0, 3, 2, 5, 1, 1, 4]])
        assert_same(load(tmp_path / "a"), theirs, ids)

    def test_the_keys_that_nanogpt_expects(self, nanogpt, tmp_path):
        """Its load_state_dict is strict."""
        path, _ = nanogpt(vocab_size=len(CHARACTERS))
        write_meta(tmp_path / "out/meta.pkl")
        assert convert.main([str(path), str(tmp_path / "n"), "--to", "nanogpt"]) == 0
        before, after = (torch.load(p, weights_only=True) for p in (path, tmp_path / "n/ckpt.pt"))
        assert before["model"].keys() == after["model"].keys()
        assert all(torch.equal(t, after["model"][n]) for n, t in before["model"].items())
        args = {**before["model_args"], "dropout": 0.0}
        assert after["model_args"] == args
        assert (tmp_path / "n/meta.pkl").read_bytes() == (tmp_path / "out/meta.pkl").read_bytes()

    def test_what_nanogpt_can_not_say(self, written, tmp_path, capsys):
        assert convert.main([str(written[0]), str(tmp_path / "n"), "--to", "nanogpt"]) == 2
        assert "the tanh approximation" in capsys.readouterr().err
        assert not (tmp_path / "n").exists()
        config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=60000)
        info = msgspec.structs.replace(load(written[0]).info, vocab_size=60000)
        with pytest.raises(CheckpointError, match="60000 byte pairs of its own"):
            write_nanogpt(LoadedModel(GPT(config), info), tmp_path / "n")

    def test_the_type_of_weights_stays(self, written, tmp_path):
        for given, dtype in (([], "float32"), (["--dtype", "float16"], "float16")):
            assert convert.main([str(written[0]), str(tmp_path / dtype), *given]) == 0
            assert load(tmp_path / dtype, as_stored).info.dtype == dtype

    def test_the_bundled_model_for_transformers(self, tmp_path):
        """Exact GELU, no biases, 65 characters: the logits of the served model's weights."""
        assert convert.main(["shakespeare-char", str(tmp_path / "hf"), "--to", "hf"]) == 0
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        ours = load(registry.PROJECT / "nanogpt/weights/shakespeare-char")
        ids = load_tokenizer(ours.info.tokenizer).encode("ROMEO:\nWhat light")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer.encode("ROMEO:\nWhat light") == ids
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits
            found = ours.model(torch.tensor([ids]), CausalAttend())
        assert (found - expected).abs().max() < 1e-4

    def test_a_file_in_the_way(self, written, tmp_path, capsys):
        (tmp_path / "o").write_text("x")
        for to in ("ours", "hf", "nanogpt"):
            assert convert.main([str(written[0]), str(tmp_path / "o"), "--to", to]) == 2
            assert "is a file: give a directory" in capsys.readouterr().err
        assert convert.main([str(written[0]), "/proc/nowhere/o"]) == 2
        assert capsys.readouterr().err.startswith("error: can't write /proc/nowhere/o")

    def test_a_bad_source_is_one_line(self, tmp_path, capsys):
        assert convert.main(["/nowhere/ckpt.pt", str(tmp_path / "o")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: there is no file or directory /nowhere/ckpt.pt")
        assert error.count("\n") == 1


class TestHub:
    @pytest.fixture
    def cache(self, written, tmp_path, monkeypatch):
        """Puts a model into an empty cache, as the hub's client does; no network."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

        def put(repo):
            place = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
            (place / "refs").mkdir(parents=True)
            (place / "refs" / "main").write_text("c0ffee")
            return shutil.copytree(written[0], place / "snapshots" / "c0ffee")

        return put

    @pytest.mark.parametrize(
        ("cached", "asked"),
        [
            ("gpt2", "gpt2"),
            ("gpt2", "openai-community/gpt2"),
            ("openai-community/gpt2", "gpt2"),
            ("someone/model", "someone/model"),
        ],
    )
    def test_cached(self, cache, written, cached, asked):
        directory = cache(cached)
        loaded = load(asked)
        assert_same(loaded, written[1])
        assert loaded.info.tokenizer.directory == str(directory)
        assert registry.estimate_memory(asked, "float16") == 2 * loaded.info.num_parameters

    @pytest.mark.parametrize("name", ["gpt2", "nobody/nothing"])
    def test_not_to_be_had(self, cache, name):
        with pytest.raises(CheckpointError, match="check the name and the network") as error:
            load(name)
        assert "\n" not in str(error.value)

    def test_cached_in_part(self, cache):
        directory = cache("gpt2")
        (directory / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"not downloaded completely|check the name"):
            load("gpt2")


class TestSourceAtOnce:
    """What the launcher can say before any process starts."""

    def test_good_ones(self, written, nanogpt):
        for source in (str(written[0]), str(nanogpt()[0]), "openai-community/gpt2"):
            registry.check_source("m", source)

    @pytest.mark.parametrize("source", ["/nowhere", "./x.pt", "a/b/c", "x.safetensors", "~/x"])
    def test_nothing_there(self, source):
        with pytest.raises(CheckpointError, match="'m': there is no file or directory"):
            registry.check_source("m", source)

    def test_directory_without_a_model(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            registry.check_source("m", str(tmp_path))

    def test_file_of_another_kind(self, tmp_path):
        (tmp_path / "ckpt.pt").write_text("x")
        with pytest.raises(CheckpointError, match=r"not a file that torch\.save wrote"):
            registry.check_source("m", str(tmp_path / "ckpt.pt"))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("width", [16, 24])
    def test_memory_of_ours(self, tmp_path, bias, width):
        config = GPTConfig(
            n_layer=3, n_head=2, n_embd=width, block_size=20, vocab_size=30, bias=bias
        )
        model = GPT(config)
        model.init_weights()
        spec = TokenizerSpec(kind="char", characters=CHARACTERS)
        checkpoint.save(tmp_path / "c", model, spec)
        for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
            expected = size * model.num_parameters()
            assert registry.estimate_memory(str(tmp_path / "c"), dtype) == expected

    def test_memory_of_the_others(self, written, nanogpt):
        path, _ = nanogpt()
        for source in (written[0], path):
            expected = 4 * load(source).info.num_parameters
            assert registry.estimate_memory(str(source), "float32") == expected

    def test_memory_before_a_download(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert registry.estimate_memory("openai-community/gpt2-xl", "float16") == 2 * 1_557_611_200
        assert registry.estimate_memory("nobody/nothing", "float16") is None

    def test_memory_of_nonsense(self, tmp_path):
        (tmp_path / "config.json").write_text('{"n_layer": 1}')
        torch.save({"n_layer": 1}, tmp_path / "x.pt")
        for source in (tmp_path, tmp_path / "x.pt"):
            with pytest.raises(CheckpointError):
                registry.estimate_memory(str(source), "float32")
