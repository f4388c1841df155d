"""Streamed text equals the text in one piece, and neither has a piece of a stop string."""

import codecs

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt.detokenizer import IncrementalDetokenizer
from nanogpt.tokenizer import CharTokenizer

# Letters that make stop strings overlap, and bytes that make characters whole, halved or wrong.
TOKENS = [
    *(b"a", b"b", b"ab", b"ba", b"aab", b"abab", b"\n", b"\n\n", b"", "é".encode()),
    *(b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"\x80", b"\xff", b"\xed\xa0\x80", b"\xe2a"),
    *("a😀b".encode(), b"b\xf0", b"\x9f\x98", b"\x80a", "\ufffd".encode(), b"\xf4\x90"),
]


class Bytes:
    """A tokenizer of which only this direction is used."""

    def token_bytes(self, token_id):
        return TOKENS[token_id]


token_ids = st.lists(st.integers(0, len(TOKENS) - 1), max_size=24)
stops = st.lists(st.text("ab\n\ufffdé😀", min_size=1, max_size=5), max_size=4).map(tuple)


def joined(ids):
    return b"".join(TOKENS[i] for i in ids)


def decoded_early(ids):
    """Text of these tokens in one piece, but for an unfinished character at the end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(joined(ids))


def first_stop(text, stops):
    """(begin, end) of the stop string that is complete first, the longest of several, or None."""
    for end in range(1, len(text) + 1):
        ending = [len(s) for s in stops if text[:end].endswith(s)]
        if ending:
            return end - max(ending), end
    return None


def chunked(ids, data):
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8).map(sorted))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(deadline=None, max_examples=600)
@given(ids=token_ids, stops=stops, data=st.data())
def test_equals_the_text_in_one_piece(ids, stops, data):
    detokenizer = IncrementalDetokenizer(Bytes(), stops)
    pieces = [detokenizer.push(chunk) for chunk in chunked(ids, data)]
    pieces.append(detokenizer.finish())

    whole = joined(ids).decode("utf-8", "replace")
    stop = first_stop(whole, stops)
    assert "".join(pieces) == (whole if stop is None else whole[: stop[0]])
    assert detokenizer.stopped == (stop is not None)

    used = len(ids)
    if stop is not None:
        counts = range(len(ids) + 1)
        complete = [k for k in counts if first_stop(decoded_early(ids[:k]), stops)]
        used = complete[0] if complete else len(ids)
    assert detokenizer.stop_token_count == used
    assert detokenizer.offsets == [len(decoded_early(ids[:i])) for i in range(used)]
    kept = [o for o in detokenizer.offsets if stop is None or o < stop[0]]
    assert detokenizer.kept_token_count == len(kept)


@settings(deadline=None, max_examples=300)
@given(ids=token_ids, stops=stops)
@example(ids=[0, 1, 0], stops=("abab",))
def test_holds_back_what_may_begin_a_stop_string_and_nothing_else(ids, stops):
    detokenizer, delivered = IncrementalDetokenizer(Bytes(), stops), ""
    for count in range(1, len(ids) + 1):
        delivered += detokenizer.push(ids[count - 1 : count])
        if detokenizer.stopped:
            assert detokenizer.push([0]) == detokenizer.finish() == ""
            return
        text = decoded_early(ids[:count])
        assert text.startswith(delivered)
        held = len(text) - len(delivered)
        endings = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
        assert held == max(endings, default=0)


def tell(text, stops, tokens):
    """(text, tokens until the stop, tokens of the text) of a text given as its tokens."""
    characters = "".join(sorted(set(text) | {"\n"}))
    tokenizer = CharTokenizer(characters)
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    shown = "".join(detokenizer.push(tokenizer.encode(part)) for part in tokens)
    return shown + detokenizer.finish(), detokenizer.stop_token_count, detokenizer.kept_token_count


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), ("one", 5, 3)),
        ("one\ntwo", ("\n\n",), ("one\ntwo", 7, 7)),
        ("aaab", ("aab",), ("a", 4, 1)),  # a beginning that fails still counts for the next
        ("abababc", ("ababc",), ("ab", 7, 2)),
        ("xabcd", ("abcd", "bc"), ("xa", 4, 2)),  # complete first
        ("xabc", ("bc", "abc"), ("x", 4, 1)),  # complete together: the longest
        ("stop", ("stop",), ("", 4, 0)),
        ("a^-]b", ("]", "^b"), ("a^-", 4, 3)),
        ("a-[b&&c", ("[b&", "-b", "\\d"), ("a-", 5, 2)),
        ("sto", ("stop",), ("sto", 3, 3)),
    ],
)
def test_which_stop_string_wins(text, stops, expected):
    assert tell(text, stops, [text]) == expected
    assert tell(text, stops, list(text)) == expected


def test_a_stop_string_inside_one_token_cuts_the_token():
    tokens = IncrementalDetokenizer(Bytes(), ("\n",))
    assert tokens.push([TOKENS.index(b"a"), TOKENS.index(b"\n\n"), TOKENS.index(b"b")]) == "a"
    assert (tokens.stop_token_count, tokens.kept_token_count) == (2, 1)


def test_a_token_partly_before_the_stop_string_is_kept():
    tokens = IncrementalDetokenizer(Bytes(), ("b",))
    assert tokens.push([TOKENS.index(b"aab")]) == "aa"
    assert (tokens.stop_token_count, tokens.kept_token_count) == (1, 1)


def test_an_unfinished_character_waits_and_is_told_at_the_end():
    tokens = IncrementalDetokenizer(Bytes())
    assert tokens.push([TOKENS.index(b"a"), TOKENS.index(b"\xf0\x9f")]) == "a"
    assert tokens.finish() == "\ufffd"
    tokens = IncrementalDetokenizer(Bytes())
    assert tokens.push([TOKENS.index(b"\xf0\x9f")]) == ""
    assert tokens.push([TOKENS.index(b"\x98\x80")]) == "😀"
    assert tokens.offsets == [0, 0]
    assert tokens.finish() == ""


def test_work_does_not_grow_with_the_text():
    """Characters that a long stop string compares, counted: a few for each one."""

    class Counted(str):
        looks = 0

        def __getitem__(self, key):
            Counted.looks += 1
            return super().__getitem__(key)

    tokenizer = CharTokenizer("ab")
    detokenizer = IncrementalDetokenizer(tokenizer, ("a" * 500 + "b" + "a" * 500,))
    (stop,) = detokenizer._stops
    stop.text = Counted(stop.text)
    text = ("a" * 501 + "b" + "a" * 499 + "b") * 20
    shown = "".join(detokenizer.push(tokenizer.encode(c)) for c in text) + detokenizer.finish()
    assert shown == text
    assert Counted.looks <= 4 * len(text)
