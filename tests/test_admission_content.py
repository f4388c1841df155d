"""Blocked terms and patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.admission_config import ContentRule
from nanogpt.api.admission.content import Content, Finding, fold, plain
from nanogpt.config import convert
from nanogpt.errors import ConfigError
from tests.admission_utils import CATASTROPHE, PREY, FakeClock


def content(**table):
    return Content(convert(table, ContentRule), FakeClock())


@pytest.mark.parametrize(
    ("term", "prompt"),
    [
        ("make a bomb", "how to MAKE A\n  BOMB?"),
        ("Straße", "in der STRASSE"),
        ("bomb", "\uff42\uff4f\uff4d\uff42"),  # full width
        ("bomb", "b\u200bo\u00admb"),  # zero-width space, soft hyphen
        ("éclair", "e\u0301clair"),
        ("毒薬", "この毒薬は"),  # scripts without spaces have no words to be whole
        ("c++", "learn c++ now"),
        (".net", "asp .net"),
        ("foo bar", "foo barn foo bar"),
        ("foo", "foo barn"),  # a longer term begins alike
    ],
)
def test_terms_are_found(term, prompt):
    assert content(terms=[term, "foo barn yard"]).find(["innocent", prompt]).finding == (
        "term",
        term,
    )


@pytest.mark.parametrize(
    ("term", "prompt"),
    [("ass", "a classic"), ("ass", "assess"), ("bomb", "bo mb"), ("42", "1421"), ("foo", "")],
)
def test_parts_of_words_are_not_terms(term, prompt):
    assert content(terms=[term]).find([prompt]).finding is None


@given(
    terms=st.lists(st.text("ab ", min_size=1, max_size=5).filter(str.strip), max_size=6),
    prompt=st.text("ab ", max_size=30),
)
def test_the_trie_finds_what_a_plain_search_finds(terms, prompt):
    padded = f" {fold(prompt)} "
    expected = any(f" {fold(term)} " in padded for term in terms)
    assert (content(terms=terms).find([prompt]).finding is not None) == expected


@given(st.text())
def test_folding_takes_any_text_and_settles(text):
    assert fold(fold(text)) == fold(text)


def test_a_pile_of_marks_costs_nothing():
    """Normalising 80 000 marks on one letter took 9 s."""
    assert len(plain("a" + "\u0301\u0323" * 500_000 + " end")) < 100


def test_patterns_are_named_and_see_the_plain_text():
    found = content(patterns={"card": r"\b(?:\d[ -]?){15}\d\b"})
    assert found.find(["no 4111 1111 1111", "my card: 4111-1111-1111-1111"]).finding == (
        "pattern",
        "card",
    )
    assert found.find(["\uff14" + "\uff11" * 15]).finding == Finding("pattern", "card")
    assert found.find(["4111"]).finding is None


def test_a_pattern_that_takes_too_long_is_no_match_and_is_counted(caplog):
    rule = content(patterns={"bad": CATASTROPHE, "good": "b$"}, pattern_timeout_ms=5)
    assert rule.find([PREY]).finding == ("pattern", "good")
    assert rule.timeouts == 1
    assert rule.find([PREY, PREY]).given_up == ("bad",)
    assert rule.find([PREY]).finding == ("pattern", "good")
    assert rule.timeouts == 3
    assert len(caplog.messages) == 1, "a client must not fill the log"
    assert "'bad'" in caplog.text
    assert PREY[:50] not in caplog.text


class Hurried(FakeClock):
    """Each look at the clock takes 4 ms."""

    def monotonic(self):
        self.advance(0.004)
        return super().monotonic()


def test_all_patterns_together_have_a_limit_too():
    rule = ContentRule(patterns={"never": "z"}, total_timeout_ms=10)
    hurried = Content(rule, Hurried())
    assert hurried.find(["text"] * 100).finding is None
    assert hurried.timeouts == 98  # two prompts in 10 ms


def test_terms_from_a_file(tmp_path):
    file = tmp_path / "terms.txt"
    file.write_text("# the list\n\nFirst term\nzweiter\n", encoding="utf-8")
    rule = content(terms=["third"], terms_file=str(file))
    assert rule.find(["a first TERM"]).finding == ("term", "First term")
    assert rule.find(["third"]).finding == ("term", "third")
    assert rule.find(["# the list"]).finding is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"patterns": {"broken": "(a"}}, "patterns.broken is not valid"),
        ({"terms_file": "/nowhere/terms"}, "can't read"),
        ({"terms": ["ok", "\u200b"]}, "1 to 200 characters"),
        ({"terms": ["x" * 201]}, "1 to 200 characters"),
    ],
)
def test_mistakes_are_found_at_the_start(table, message):
    with pytest.raises(ConfigError, match=message):
        content(**table)


def test_many_terms_compile():
    terms = [f"term {number:05d} {'x' * (number % 20)}" for number in range(3000)]
    rule = content(terms=terms)
    assert rule.find([f"… {terms[2999].upper()} …"]).finding == ("term", terms[2999])
