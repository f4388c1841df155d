"""Blocked terms and patterns in prompts, in bounded time.

Terms are compared without regard to case, compatibility forms (NFKC), invisible characters and
the kind of white space, and as whole words. All of them are one trie, so the time does not grow
with their number. Patterns are regular expressions of the operator; one that takes too long on a
prompt counts as no match there, and is reported.
"""

import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import regex

from nanogpt.admission_config import ContentRule
from nanogpt.api.admission.clock import Clock
from nanogpt.errors import ConfigError

log = logging.getLogger("admission")

# Not inside a word: a letter or digit on both sides would make it one. Letters of scripts that
# write no spaces (Chinese, Japanese, Thai, … are category Lo) don't join.
_JOINING = r"[\w--\p{Lo}]"
_EDGE = rf"(?:(?<!{_JOINING})|(?!{_JOINING}))"

_INVISIBLE = regex.compile(r"\p{Cf}+")
MAX_MARKS = 30
_EXCESS_MARKS = regex.compile(rf"\p{{M}}{{{MAX_MARKS}}}\K\p{{M}}+")
MAX_TERM_CHARS = 200  # a term is a depth in the trie


class Finding(NamedTuple):
    """Which rule matched: never any text of the prompt."""

    kind: str  # "term" or "pattern"
    name: str  # the term as configured, or the pattern's name


class Search(NamedTuple):
    """What was found, and the patterns whose search was given up on some prompt."""

    finding: Finding | None
    given_up: tuple[str, ...]


class Content:
    """Thread-safe. Raises ConfigError for terms and patterns that can't be used."""

    def __init__(self, rule: ContentRule, clock: Clock) -> None:
        self._clock = clock
        self._each_s = rule.pattern_timeout_ms / 1000
        self._total_s = rule.total_timeout_ms / 1000
        terms = [*rule.terms, *_read_terms(rule.terms_file)]
        self._terms = {fold(term): term for term in terms}
        for term in self._terms:
            if not 0 < len(term) <= MAX_TERM_CHARS:
                raise ConfigError(
                    f"admission.content: a term must have 1 to {MAX_TERM_CHARS} characters, "
                    f"not {len(term)}: {term[:50]!r}"
                )
        self._term = _compile_terms(list(self._terms))
        self._patterns = {name: _compile(name, text) for name, text in rule.patterns.items()}
        self._slow: set[str] = set()  # patterns that have been given up before
        self.timeouts = 0  # searches that were given up

    def __bool__(self) -> bool:
        return self._term is not None or bool(self._patterns)

    def find(self, prompts: Sequence[str]) -> Search:
        """The first match in any of the prompts."""
        deadline = self._clock.monotonic() + self._total_s
        given_up: dict[str, None] = {}  # in order, each once
        for prompt in prompts:
            finding = self._find_term(prompt) or self._find_pattern(prompt, deadline, given_up)
            if finding is not None:
                return Search(finding, tuple(given_up))
        return Search(None, tuple(given_up))

    def _find_term(self, prompt: str) -> Finding | None:
        match = self._term.search(fold(prompt), concurrent=True) if self._term else None
        return Finding("term", self._terms[match[0]]) if match else None

    def _find_pattern(
        self, prompt: str, deadline: float, given_up: dict[str, None]
    ) -> Finding | None:
        text = plain(prompt) if self._patterns else ""
        for name, pattern in self._patterns.items():
            left = min(self._each_s, deadline - self._clock.monotonic())
            try:
                if left <= 0:
                    raise TimeoutError
                # concurrent: other threads run meanwhile
                if pattern.search(text, timeout=left, concurrent=True):
                    return Finding("pattern", name)
            except TimeoutError:
                given_up[name] = None
                self._gave_up(name, len(text))
        return None

    def _gave_up(self, name: str, characters: int) -> None:
        self.timeouts += 1
        if name not in self._slow:
            self._slow.add(name)
            log.warning(
                "pattern %r took too long on a prompt of %d characters: no match; "
                "from now on this is only counted",
                name,
                characters,
            )


def plain(text: str) -> str:
    """Compatibility forms as their plain ones, without invisible characters (category Cf).

    Marks past the `MAX_MARKS`th on one letter are dropped: the time that normalising takes grows
    with the square of their number (and UAX #15, 13.4 draws the line there, too).
    """
    if text.isascii():
        return text
    text = _EXCESS_MARKS.sub("", _INVISIBLE.sub("", text))
    return unicodedata.normalize("NFKC", text)


def fold(text: str) -> str:
    """`plain`, without case, and with every run of white space as one space."""
    folded = plain(text).casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", folded)
    return " ".join(folded.split())


def _read_terms(path: str) -> list[str]:
    if not path:
        return []
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read admission.content.terms_file {path}: {error}") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _compile(name: str, pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"admission.content.patterns.{name} is not valid: {error}") from error


def _compile_terms(terms: Sequence[str]) -> Any:
    if not terms:
        return None
    root: dict[str, Any] = {}
    for term in terms:
        node = root
        for character in term:
            node = node.setdefault(character, {})
        node[""] = {}  # a term ends here
    return regex.compile(f"(?V1){_EDGE}{_trie(root)}{_EDGE}")


def _trie(node: dict[str, Any]) -> str:
    """A regular expression of what is below a node: the longest first."""
    branches = [regex.escape(c, special_only=False) + _trie(n) for c, n in node.items() if c]
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")
