"""The finetuning recipe: from models in Hugging Face's format to one that is served, and back."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt.bpe_files import END_OF_TEXT, read_bpe_files
from nanogpt.config import PROJECT
from nanogpt.data import prepare
from nanogpt.data.dataset import Dataset
from nanogpt.engine.engine import Engine
from nanogpt.eval import __main__ as evaluation
from nanogpt.model import convert
from nanogpt.model.gpt import CausalAttend
from nanogpt.model.load import load_model
from nanogpt.tokenizer import load_tokenizer
from nanogpt.train import __main__ as train
from tests.engine_utils import request, run_all
from tests.hf_models import TINY, random_model, write_vocabulary

RECIPE = PROJECT / "configs/train/shakespeare_finetune.toml"
TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom.\n" * 60


def small_vocabulary(directory: Path) -> None:
    """80 merges of the text's own, and the end token behind them."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=336, min_frequency=1, show_progress=False)
    trained.save_model(str(directory))
    path = directory / "vocab.json"
    vocab = json.loads(path.read_text())
    path.write_text(json.dumps(vocab | {END_OF_TEXT: len(vocab)}))


@pytest.fixture(params=["gpt2's tokens", "a small vocabulary"])
def source(request, tmp_path):
    """A randomly initialised GPT-2 as transformers writes it."""
    directory = tmp_path / "hf"
    directory.mkdir()
    (write_vocabulary if request.param == "gpt2's tokens" else small_vocabulary)(directory)
    size = read_bpe_files(directory).n_vocab
    random_model(**TINY | {"vocab_size": size, "n_positions": 24}).save_pretrained(directory)
    return directory


def run(tmp_path, source, **changes):
    values = {
        "data": tmp_path / "data",
        "init_from": source,
        "dtype": "float32",
        "lr": 3e-3,
        "accumulate": 2,
        "max_steps": 30,
        **changes,
    }
    settings = [f"--set={key}={value}" for key, value in values.items()]
    train.main(["--config", str(RECIPE), "--out", str(tmp_path / "out"), *settings])


@pytest.mark.usefixtures("one_thread")
def test_end_to_end(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: pytest.fail("a download"))
    (tmp_path / "text.txt").write_text(TEXT)
    where = ["--input", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data")]
    prepare.main(["bpe", "--tokenizer-of", str(source), *where])
    theirs = AutoTokenizer.from_pretrained(source)
    part, _ = prepare.split(TEXT)
    assert Dataset(tmp_path / "data").train.tolist() == theirs.encode(part)
    run(tmp_path, source)
    with open(tmp_path / "out/loss.csv") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file)]
    best = tmp_path / "out/best"
    first = load_model(str(source), "m", dtype=torch.float32, device="cpu")
    loaded = load_model(str(best), "m", dtype=lambda found: found, device="cpu")
    # It begins with the other model's network and tokens, learns, and keeps both.
    assert losses[-1] < losses[0] < _loss(first, tmp_path)
    assert loaded.model.config == first.model.config
    assert loaded.info.tokenizer.directory == str(best)
    assert read_bpe_files(best) == read_bpe_files(source)
    # The evaluation of the finished model says what training said.
    assert evaluation.main([str(best), "--data", str(tmp_path / "data"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert abs(float(said.partition("| loss | ")[2].split()[0]) - min(losses)) < 2e-3  # float16
    # transformers reads the result.
    assert convert.main([str(best), str(tmp_path / "back"), "--to", "hf"]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "back").encode("It was the best")
    assert ids == load_tokenizer(loaded.info.tokenizer).encode("It was the best")
    wide = load_model(str(best), "m", dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        found = wide.model(torch.tensor([ids]), CausalAttend())
        assert (found - back(torch.tensor([ids])).logits).abs().max() < 1e-4
    # And it is served.
    engine = Engine(wide, rank=0, device="cpu", num_kv_blocks=16, block_size=4)
    result = run_all(engine, request("r", ids, temperature=0.0, max_tokens=5))
    assert len(result.tokens["r", 0]) == 5


def _loss(loaded, tmp_path):
    from nanogpt.train.evaluate import evaluate

    return evaluate(loaded.model, Dataset(tmp_path / "data").val)


def test_data_of_another_vocabulary(tmp_path, capsys):
    """Its ids would be read as other tokens, without a word."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_vocabulary(tmp_path / "a")
    small_vocabulary(tmp_path / "b")
    size = read_bpe_files(tmp_path / "b").n_vocab
    random_model(**TINY | {"vocab_size": size}).save_pretrained(tmp_path / "b")
    vocabulary = prepare.vocabulary_of(str(tmp_path / "a"))
    prepare.prepare("bpe", TEXT.encode(), "text", tmp_path / "data", vocabulary)
    with pytest.raises(SystemExit) as left:
        run(tmp_path, tmp_path / "b")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"prepare the data as bpe --tokenizer-of {tmp_path / 'b'}" in said


def test_special_tokens_in_a_text_are_text(tmp_path):
    (tmp_path / "v").mkdir()
    small_vocabulary(tmp_path / "v")
    vocabulary = prepare.vocabulary_of(str(tmp_path / "v"))
    text = END_OF_TEXT * 20
    prepare.prepare("bpe", text.encode(), "text", tmp_path / "data", vocabulary)
    data = Dataset(tmp_path / "data")
    assert vocabulary.end_of_text not in np.concatenate([data.train, data.val])
    assert data.meta.tokenizer.directory == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bpe", "--tokenizer-of", "nobody/nothing"], "nobody/nothing is not here: fetch it first"),
        (["char", "--tokenizer-of", "x"], "--tokenizer-of is for bpe"),
        (["char", "--input", "/nowhere.txt"], "can't read /nowhere.txt"),
    ],
)
def test_mistakes_of_prepare(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        prepare.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
