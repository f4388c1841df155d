"""Token ids are those of transformers' GPT2Tokenizer, for every text."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from transformers import GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanogpt.config import PROJECT
from nanogpt.errors import CheckpointError, InvalidRequest
from nanogpt.model import checkpoint
from nanogpt.registry import TokenizerSpec
from nanogpt.tokenizer import CharTokenizer, load_tokenizer
from tests.hf_models import write_vocabulary

END = "<|endoftext|>"
PIECES = [
    *(END, "<|", "|>", "endoftext", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x1c", "\x85"),
    *("\xa0", "\u180e", "\u200b", "\u2028", "\u3000", "\ufeff", "\0", "'s", "'LL", "'ve", "' t"),
    *("don't", "12", "½", "٣", "hello", " world", "é", "e\u0301", "ß", "İ", "的", "한", "😀"),
    *("👩\u200d👩\u200d👧", "🇩🇪", "\U000e0041", "\U0010ffff", "--", "...", "ÃÂÃÂ", "_", "$", "("),
]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30).map("".join),
)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("gpt2-vocabulary"))


@pytest.fixture(scope="session")
def gpt2(directory):
    return load_tokenizer(TokenizerSpec(kind="gpt2", directory=str(directory)))


@pytest.fixture(scope="session")
def reference(directory):
    return GPT2Tokenizer.from_pretrained(directory)


@settings(deadline=None, max_examples=500)
@given(text=texts)
@example(text=f" {END}{END} \n{END}")
def test_same_ids_as_transformers(gpt2, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference.encode(text)
    assert gpt2.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 50256), max_size=20))
def test_any_ids_decode_and_encode_as_in_transformers(gpt2, reference, ids):
    text = gpt2.decode(ids)
    assert text == reference.decode(ids, clean_up_tokenization_spaces=False)
    assert gpt2.encode(text) == reference.encode(text)


def test_every_token_has_the_bytes_of_transformers(gpt2, reference):
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokens = reference.convert_ids_to_tokens(range(len(reference)))
    expected = [bytes(byte_of[symbol] for symbol in token) for token in tokens]
    assert [gpt2.token_bytes(i) for i in range(gpt2.n_vocab)] == expected
    assert gpt2.max_token_bytes == max(map(len, expected))


def test_limits_of_the_vocabulary(gpt2):
    assert (gpt2.n_vocab, gpt2.eos_token_id, gpt2.start_token_id) == (50257, 50256, 50256)
    assert gpt2.token_bytes(50256) == END.encode()
    for bad in (-1, 50257, 50303):
        with pytest.raises(InvalidRequest, match=f"{bad} is not in the vocabulary"):
            gpt2.token_bytes(bad)


@pytest.mark.parametrize("after", ["x", " x", END, "", "\x1c", "\x1cx"])
@pytest.mark.parametrize("space", [" ", "\n", "\u3000\t\n"])
def test_long_white_space(gpt2, reference, space, after):
    """tiktoken's regular expressions give up on a million characters of white space, so longer
    runs are cut where GPT-2's pattern cuts them: not at the end of the text or before <|endof..."""
    text = f"a{space * 100_002}{after}"
    assert gpt2.encode(text) == reference.encode(text)


def test_a_megabyte_of_white_space_before_a_letter(gpt2):
    ids = gpt2.encode(" " * 1_200_000 + "x")
    assert ids == [220] * 1_199_999 + gpt2.encode(" x")


@pytest.mark.parametrize("unit", ["a", "ab", "-", "0", "é", "😀", "a b", "'"])
def test_a_megabyte_of_the_same(gpt2, unit):
    text = unit * (1_000_000 // len(unit.encode()))
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert len(ids) * gpt2.max_token_bytes >= len(text.encode())


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\udc00\ud800", f"{END}\ud83d"])
def test_lone_surrogates_are_refused(gpt2, text):
    with pytest.raises(InvalidRequest, match="half of a surrogate pair") as error:
        gpt2.encode(text)
    assert error.value.param == "prompt"


def test_tokenizer_json_alone_is_enough(gpt2, reference, tmp_path):
    reference.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    tokenizer = load_tokenizer(TokenizerSpec(kind="gpt2", directory=str(tmp_path)))
    text = f"Hello,  world!\n{END}"
    assert tokenizer.encode(text) == gpt2.encode(text)


def test_added_tokens(directory, tmp_path):
    """A fine-tuned model's padding token counts among the ids and is found in a text."""
    theirs = GPT2Tokenizer.from_pretrained(directory)
    theirs.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(TokenizerSpec(kind="gpt2", directory=str(tmp_path)))
    text = f"a [PAD]<|user|> b{END}[PAD"
    assert tokenizer.n_vocab == len(theirs) == 50259
    assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.decode([50257]) == "[PAD]"
    assert tokenizer.eos_token_id == 50256


def test_tiktokens_own_files(gpt2, directory, monkeypatch):
    def read_file(place):
        return (directory / ("vocab.json" if "json" in place else "merges.txt")).read_bytes()

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tokenizer = load_tokenizer(TokenizerSpec(kind="gpt2"))
    assert tokenizer.encode(f"Hi 😀{END}") == gpt2.encode(f"Hi 😀{END}")
    assert tokenizer.n_vocab == 50257


def test_no_network_is_said_in_one_line(monkeypatch):
    def read_file(place):
        raise ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt beside the weights"):
        load_tokenizer(TokenizerSpec(kind="gpt2"))


def damage_vocab(change):
    def damage(path):
        vocab = json.loads((path / "vocab.json").read_text())
        change(vocab)
        (path / "vocab.json").write_text(json.dumps(vocab))

    return damage


def swap_ids(vocab):
    vocab["he"], vocab["in"] = vocab["in"], vocab["he"]


def edit_merges(change):
    def damage(path):
        text = change((path / "merges.txt").read_text(encoding="utf-8"))
        (path / "merges.txt").write_text(text, encoding="utf-8")

    return damage


DAMAGES = {
    "no end token": (damage_vocab(lambda v: v.pop(END)), "has no <|endoftext|>"),
    "a hole": (damage_vocab(lambda v: v.update({END: 60000})), "ids must be 0 to n - 1"),
    "ids out of order": (damage_vocab(swap_ids), "not in the order of the merges"),
    "no byte": (damage_vocab(lambda v: v.pop("a")), "no token for the byte 0x61"),
    "foreign token": (damage_vocab(lambda v: v.update({"中": 50257})), "byte alphabet"),
    "a merge less": (edit_merges(lambda t: t[: t.rindex("\n", 0, -1) + 1]), "49999 merges"),
    "three parts": (edit_merges(lambda t: t + "a b c\n"), "a merge is two tokens"),
    "not JSON": (lambda path: (path / "vocab.json").write_text("{"), "not a tokenizer's file"),
    "no merges": (lambda path: (path / "merges.txt").unlink(), "can't read"),
    "nothing": (lambda path: [file.unlink() for file in path.iterdir()], "can't read"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_vocabularies(directory, tmp_path, what):
    damage, message = DAMAGES[what]
    path = shutil.copytree(directory, tmp_path / "copy")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(TokenizerSpec(kind="gpt2", directory=str(path)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        ("normalizer", {"type": "NFC"}),
        ("model", {"type": "WordPiece", "vocab": {}, "merges": []}),
    ],
)
def test_tokenizers_of_another_kind(tmp_path, key, value):
    raw = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "normalizer": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(CheckpointError, match="not a tokenizer of GPT-2's kind"):
        load_tokenizer(TokenizerSpec(kind="gpt2", directory=str(tmp_path)))


def test_characters():
    tokenizer = CharTokenizer("\n abé😀")
    assert tokenizer.encode("é 😀\n") == [4, 1, 5, 0]
    assert tokenizer.decode([4, 1, 5, 0]) == "é 😀\n"
    assert tokenizer.token_bytes(4) == b"\xc3\xa9"
    assert (tokenizer.n_vocab, tokenizer.eos_token_id, tokenizer.start_token_id) == (6, None, 0)
    assert tokenizer.max_token_bytes == 4
    assert CharTokenizer("ab\n").start_token_id == 2
    assert CharTokenizer("ab").start_token_id == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aaZ", r"'Z' \(U\+005A\) at position 2"),
        ("日", r"'日' \(U\+65E5\) at position 0"),
        ("a\x00", r"'\\x00' \(U\+0000\) at position 1"),
        ("\ud800", r"'\\ud800' \(U\+D800\) at position 0"),
    ],
)
def test_unknown_characters_are_named(text, said):
    with pytest.raises(InvalidRequest, match=said) as error:
        CharTokenizer("\nab").encode(text)
    assert (error.value.status, error.value.param) == (400, "prompt")


def test_all_unknown_characters_are_named_once():
    with pytest.raises(InvalidRequest, match=r"character 'é' .* position 1 .* 'zy水' further on"):
        CharTokenizer("\nab").encode("aézyé水zb")


def test_a_character_for_all_unknown_ones():
    tokenizer = load_tokenizer(TokenizerSpec(kind="char", characters="\nab?", unknown="?"))
    assert tokenizer.encode("aéb水\ud800?") == [1, 3, 2, 3, 3, 3]
    assert tokenizer.decode(tokenizer.encode("aéb")) == "a?b"


def test_round_trip_of_the_training_data():
    """The ids are those of the data that the bundled model was trained on, where that is here."""
    _, spec = checkpoint.read_config(PROJECT / "nanogpt/weights/shakespeare-char")
    tokenizer = load_tokenizer(spec)
    assert tokenizer.encode(spec.characters) == [*range(65)]
    data = PROJECT / "data/shakespeare_char"
    if not (data / "val.bin").exists():
        pytest.skip("tinyshakespeare is not prepared here")
    for file in ("train.bin", "val.bin"):
        ids = np.fromfile(data / file, "<u2").tolist()
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("text", ["a" * 2**21, "The quick brown fox. " * 10**5])
def test_others_run_while_a_long_text_is_encoded(gpt2, text):
    """The work is done without Python's lock."""
    turns, ended = 0, threading.Event()

    def count():
        nonlocal turns
        while not ended.is_set():
            time.sleep(0.001)
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    before = turns
    gpt2.encode(text)
    during = turns - before
    ended.set()
    other.join()
    assert during > 10


def test_the_reference_is_the_library_and_not_ours(reference):
    """Were GPT2Tokenizer built on tiktoken, the comparisons above would show nothing."""
    assert isinstance(reference.backend_tokenizer, HFTokenizer)
