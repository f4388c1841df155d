"""nanogpt eval: the numbers of training's own evaluation and of transformers; strides; the card."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from nanogpt.bpe_files import read_bpe_files
from nanogpt.config import PROJECT
from nanogpt.data.prepare import prepare
from nanogpt.engine.cpu.linear import pack_model
from nanogpt.errors import ConfigError
from nanogpt.eval import __main__ as command
from nanogpt.eval import card
from nanogpt.eval import text as texts
from nanogpt.eval.score import Score, Window, score, windows_of
from nanogpt.model import checkpoint
from nanogpt.model.dtypes import DTYPES
from nanogpt.model.load import load_model
from nanogpt.registry import TokenizerSpec
from nanogpt.tokenizer import load_tokenizer
from nanogpt.train.evaluate import evaluate
from tests.hf_models import TINY, write_model
from tests.small_gpt import small_gpt

CHARACTERS = "".join(chr(32 + i) for i in range(63)) + "é→"  # 65, of one to three bytes
TEXT = "The quick brown fox — “naïve” — jumps over 13 lazy dogs; 水 and 🙂 too.\n" * 9


@pytest.fixture(scope="module")
def small():
    """Network, tokenizer and some tokens, a few more than fit into windows of 128."""
    tokens = np.random.default_rng(0).integers(0, 65, 128 * 5 + 40)
    spec = TokenizerSpec(kind="char", characters=CHARACTERS)
    return small_gpt(), load_tokenizer(spec), tokens


@torch.inference_mode()
def reference(model, tokens, start, length, first):
    """Summed loss of targets `first` on, from the plain network."""
    from nanogpt.model.gpt import CausalAttend

    x = torch.from_numpy(tokens[start : start + length])[None]
    y = torch.from_numpy(tokens[start + 1 : start + length + 1])
    losses = F.cross_entropy(model(x, CausalAttend())[0], y, reduction="none")
    return losses[first:].double().sum().item()


@pytest.mark.parametrize("packed", [False, True])
def test_equals_trainings_own(small, packed):
    model, tokenizer, tokens = small
    expected = evaluate(model, tokens)
    if packed:
        model = small_gpt()
        pack_model(model)
    found = score(model, tokenizer, tokens, windows_of(len(tokens), 128), quiet=True)
    assert found.tokens == 5 * 128
    assert found.loss == pytest.approx(expected, rel=2e-6)


def test_equals_trainings_own_beside_rows_of_padding():
    model = small_gpt()
    tokens = np.random.default_rng(0).integers(0, 50, 128 * 3 + 1)
    few = load_tokenizer(TokenizerSpec(kind="char", characters=CHARACTERS[:50]))
    expected = evaluate(model, tokens, vocab_size=50)
    found = score(model, few, tokens, windows_of(len(tokens), 128), quiet=True)
    assert found.loss == pytest.approx(expected, rel=2e-6)
    assert found.loss < evaluate(model, tokens)


def test_a_special_token_in_a_text_is_text_as_when_it_is_prepared(tmp_path):
    write_model(tmp_path / "hf", **TINY)
    info = load_model(str(tmp_path / "hf"), "m", dtype=torch.float32, device="cpu").info
    content = ("First.<|endoftext|>" * 30).encode()
    (tmp_path / "text.txt").write_bytes(content)
    prepare("bpe", content, "text", tmp_path / "data", read_bpe_files(tmp_path / "hf"))
    tokenizer = load_tokenizer(info.tokenizer)
    read = [texts.read(tmp_path / name, "all", info, tokenizer) for name in ("text.txt", "data")]
    assert abs(len(read[0].tokens) - len(read[1].tokens)) <= 1  # the parts meet within a token
    assert info.eos_token_id not in read[0].tokens


def test_equals_transformers(tmp_path):
    """On byte pairs, in many batches, with text of all widths."""
    theirs = write_model(tmp_path / "hf", **TINY)
    loaded = load_model(str(tmp_path / "hf"), "m", dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(loaded.info.tokenizer)
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf").encode(TEXT)
    tokens = np.array(tokenizer.encode(TEXT))
    assert tokens.tolist() == ids
    windows = windows_of(len(tokens), 32)
    found = score(loaded.model, tokenizer, tokens, windows, quiet=True)
    parts = [torch.tensor(ids[w.start : w.start + 33]) for w in windows]
    with torch.inference_mode():
        nats = sum(
            F.cross_entropy(theirs(p[None, :-1]).logits[0], p[1:], reduction="sum").double().item()
            for p in parts
        )
    scored = tokenizer.decode(ids[1 : found.tokens + 1])
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert (found.characters, found.bytes) == (len(scored), len(scored.encode()))
    assert found.bytes > found.characters


@pytest.mark.parametrize("stride", [1, 37, 64, 128])
def test_strides(small, stride):
    model, tokenizer, tokens = small
    if stride == 1:
        tokens = tokens[:140]
    windows = windows_of(len(tokens), 128, stride)
    found = score(model, tokenizer, tokens, windows, quiet=True)
    expected = sum(reference(model, tokens, w.start, w.length, w.skip) for w in windows)
    assert found.tokens == len(tokens) - 1  # each but the first, once
    assert found.nats == pytest.approx(expected, rel=1e-6)
    counted = [w.start + 1 + i for w in windows for i in range(w.skip, w.length)]
    assert counted == [*range(1, len(tokens))]
    assert all(w.skip >= 128 - stride for w in windows[1:])  # so much stands before what counts


def test_windows():
    assert windows_of(9, 4) == [Window(0, 4), Window(4, 4)]
    assert windows_of(8, 4) == [Window(0, 4)]  # the last token needs no window, as in training
    assert windows_of(3, 4, 4) == [Window(0, 2)]
    for tokens, stride in ((4, 0), (1, 2), (9, 5), (9, -1)):
        with pytest.raises(ConfigError):
            windows_of(tokens, 4, stride)


def test_figures():
    s = Score(nats=20.0, tokens=10, characters=25, bytes=40)
    assert (s.loss, s.perplexity) == (2.0, math.exp(2))
    assert s.bits_per_character == pytest.approx(20 / math.log(2) / 25)
    assert s.bits_per_byte == pytest.approx(20 / math.log(2) / 40)


def test_padding_has_no_share(tmp_path):
    """A model whose embedding has more rows than its tokenizer has ids."""
    tokens = np.random.default_rng(1).integers(0, 60, 200)
    model, spec = small_gpt(), TokenizerSpec(kind="char", characters=CHARACTERS[:60])
    found = score(model, load_tokenizer(spec), tokens, [Window(0, 100)], quiet=True)
    model.wte.weight.data = model.wte.weight[:60].clone()
    model.lm_head.weight = model.wte.weight
    assert found.nats == pytest.approx(reference(model, tokens, 0, 100, 0), rel=1e-6)


class TestCommand:
    @pytest.fixture
    def here(self, tmp_path, monkeypatch):
        """A checkpoint with a card, a text, and the text prepared."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        text = "".join(np.random.default_rng(2).choice([*CHARACTERS], 2000)) + CHARACTERS
        spec = TokenizerSpec(kind="char", characters="".join(sorted(CHARACTERS)))
        checkpoint.save(
            "m", small_gpt(), spec, files={"README.md": b"# M\n\nGood.\n\n## Recipe\n\nx\n"}
        )
        (tmp_path / "text.txt").write_text(text)
        prepare("char", text.encode(), "text", tmp_path / "data")
        return tmp_path

    def rows(self, capsys):
        lines = capsys.readouterr().out.splitlines()
        return dict(line.strip("| ").split(" | ", 1) for line in lines[2:])

    def test_a_text_and_the_same_text_prepared(self, here, capsys):
        assert command.main(["m", "--data", "text.txt"]) == 0
        first = self.rows(capsys)
        assert command.main(["m", "--data", "data"]) == 0
        second = self.rows(capsys)
        assert first.pop("text").startswith("text.txt, the last 10 %, SHA-256")
        assert second.pop("text").startswith("text, the last 10 %, SHA-256")
        assert first == second
        assert first["tokens"] == "128 of 207"
        assert first["windows"] == "1 of 128 tokens, consecutive"
        expected = evaluate(
            load_model("m", "m", dtype=torch.float16, device="cpu").model.float(),
            np.fromfile(here / "data/val.bin", "<u2"),
        )
        assert abs(float(first["loss"].split()[0]) - expected) < 6e-5

    @pytest.mark.parametrize(("part", "tokens"), [("train", "1,792 of 1,858"), ("all", "2,048")])
    def test_parts(self, here, capsys, part, tokens):
        assert command.main(["m", "--data", "text.txt", "--split", part]) == 0
        assert self.rows(capsys)["tokens"].startswith(tokens)

    def test_the_card(self, here, capsys):
        for stride in ("64", "32"):  # the second takes the first one's place
            given = ["m", "--data", "data", "--stride", stride, "--write-card"]
            assert command.main(given) == 0
            shown = capsys.readouterr().out
            written = (here / "m/README.md").read_text()
            assert written.startswith("# M\n\nGood.\n\n## Recipe\n\nx\n\n## Evaluation\n\n")
            assert written.count(card.HEADING) == 1
            assert shown in written
            assert written.endswith(f"Written by `nanogpt eval {' '.join(given)}`.\n")
        card.write(here / "m", "NEW", "c")
        assert "NEW" in (here / "m/README.md").read_text()

    def test_a_section_in_the_middle_of_the_card(self, here):
        path = here / "m/README.md"
        path.write_text("# M\n\n## Evaluation\n\nold\n\n### of old\n\n## Recipe\n\nx\n")
        card.write(here / "m", "NEW", "c")
        assert path.read_text() == (
            "# M\n\n## Evaluation\n\nNEW\n\nWritten by `c`.\n\n## Recipe\n\nx\n"
        )

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (["nothing/here/x", "--data", "text.txt"], "no file or directory"),
            (["m", "--data", "nowhere.txt"], "can't read nowhere.txt"),
            (["m", "--data", "latin.txt"], "is not UTF-8"),
            (["m", "--data", "odd.txt"], "does not know the character '水'"),
            (["m", "--data", "other"], "other tokens than the model"),
            (["m", "--data", "short.txt"], "too few"),
            (["m", "--data", "text.txt", "--stride", "129"], "from 1 to the context, 128"),
            (["x.pt", "--data", "text.txt", "--write-card"], "has no card"),
        ],
    )
    def test_mistakes_are_one_line(self, here, capsys, given, said):
        (here / "latin.txt").write_bytes(b"caf\xe9")
        (here / "odd.txt").write_text("X" * 20 + "水水水")
        (here / "short.txt").write_text("SHORT")
        prepare("char", b"other text", "t", here / "other")
        assert command.main(given) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["shakespeare-char", "shakespeare-deep"])
def test_the_bundled_card_is_of_the_bundled_weights(name):
    directory = PROJECT / "nanogpt/weights" / name
    text = (directory / "README.md").read_text()
    dtype, fingerprint = re.search(r"\| weights \| (\w+), fingerprint (\w+) \|", text).groups()
    loaded = load_model(str(directory), "m", dtype=DTYPES[dtype], device="cpu")
    assert loaded.info.fingerprint == fingerprint
    evaluated, trained = (
        re.search(rf"\| {row} \| ([\d.]+) nats a token \|", text)[1]
        for row in ("loss", "validation loss")
    )
    assert evaluated == trained
