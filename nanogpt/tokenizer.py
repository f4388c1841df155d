"""Text to token ids and back, without torch: characters, or GPT-2's byte pairs.

A byte-pair tokenizer gives the same ids as `transformers`' GPT2Tokenizer for every text, special
tokens that are written out in the text included. tiktoken does the work, in time proportional to
the text, also for a megabyte of one letter: from its release 0.14 on (0.12 took minutes).
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

from nanogpt.bpe_files import END_OF_TEXT, BPEFiles, read_bpe_files
from nanogpt.errors import CheckpointError, InvalidRequest
from nanogpt.registry import TokenizerSpec

# What GPT-2's pattern calls white space: Unicode's White_Space (Python's \s has four more).
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# tiktoken's regex engine gives up on a million of them before another character.
_LONG_RUN = 100_000
_NAMED = 20  # unknown characters in a message, besides the first


class Tokenizer(Protocol):
    """Ids are 0 to n_vocab - 1. Each stands for some bytes; only whole texts need be UTF-8."""

    n_vocab: int
    eos_token_id: int | None
    start_token_id: int  # stands for an empty prompt
    max_token_bytes: int  # so len(text.encode()) / max_token_bytes tokens at the least

    def encode(self, text: str) -> list[int]:
        """Raises InvalidRequest, of param "prompt", when the text can't be encoded."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Raises InvalidRequest for an id that isn't there."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the joined bytes; what is not UTF-8 becomes U+FFFD."""
        ...


class _Table:
    """The direction from ids to bytes, the same for both kinds."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self.n_vocab = len(token_bytes)
        self.max_token_bytes = max(map(len, token_bytes))

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.n_vocab:
            raise InvalidRequest(
                f"token id {token_id} is not in the vocabulary: ids are 0 to {self.n_vocab - 1}"
            )
        return self._token_bytes[token_id]

    def decode(self, token_ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


class CharTokenizer(_Table):
    """`characters[i]` is token i. There is no end token; a newline starts a document.

    `unknown`, one of them, is read for every character that is none of them, if there is one.
    """

    eos_token_id: int | None = None

    def __init__(self, characters: str, unknown: str = "") -> None:
        super().__init__([c.encode() for c in characters])
        self._ids = {c: i for i, c in enumerate(characters)}
        self._unknown_id = self._ids.get(unknown)
        self.start_token_id = self._ids.get("\n", 0)

    def encode(self, text: str) -> list[int]:
        ids = [self._ids.get(c, self._unknown_id) for c in text]
        if None in ids:
            raise self._refusal(text)
        return cast(list[int], ids)

    def _refusal(self, text: str) -> InvalidRequest:
        first, *others = [c for c in dict.fromkeys(text) if c not in self._ids]
        more = f" (and {''.join(others)[:_NAMED]!r} further on)" if others else ""
        return InvalidRequest(
            f"the model does not know the character {first!r} (U+{ord(first):04X}) at position "
            f"{text.index(first)} of the prompt{more}; it knows {self.n_vocab}: "
            f"{''.join(self._ids)[:100]!r}",
            param="prompt",
        )


class BPETokenizer(_Table):
    """GPT-2's byte pairs. `<|endoftext|>` in a text is the special token, and starts a document."""

    def __init__(self, files: BPEFiles) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

        super().__init__(files.token_bytes())
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=files.ranks,
            special_tokens=files.special,
            explicit_n_vocab=self.n_vocab,
        )
        self.start_token_id = files.end_of_text
        self.eos_token_id: int | None = self.start_token_id
        after = "|".join(map(re.escape, files.special))
        self._long_space = re.compile(rf"(?<!{_SPACE}){_SPACE}{{{_LONG_RUN},}}+(?!{after}|\Z)")

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt has half of a surrogate pair (U+{ord(text[error.start]):04X}) at "
                f"position {error.start}: send it as valid Unicode",
                param="prompt",
            ) from error
        ids: list[int] = []
        for part in self._split(text):
            ids += self._encoding.encode(part, allowed_special="all")
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """As `encode`, but a special token that is written out is text like any other."""
        return self._encoding.encode_ordinary(text)

    def _split(self, text: str) -> list[str]:
        """Parts that encode separately to the same ids as the whole.

        GPT-2's pattern takes a run of white space but for its last character, when an ordinary
        character follows: right there a part may end.
        """
        if len(text) < _LONG_RUN:
            return [text]
        cuts = [0, *(m.end() - 1 for m in self._long_space.finditer(text)), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(cuts)]


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Raises CheckpointError when files are missing or not what they should be."""
    if spec.kind == "char":
        return CharTokenizer(spec.characters, spec.unknown)
    return BPETokenizer(read_bpe_files(spec.directory) if spec.directory else gpt2_files())


def check_vocabulary(spec: TokenizerSpec) -> None:
    """Raises CheckpointError when the vocabulary is GPT-2's own and that can't be had."""
    if spec.kind == "gpt2" and not spec.directory:
        gpt2_files()


def gpt2_files() -> BPEFiles:
    """GPT-2's own vocabulary, downloaded once by tiktoken, or from TIKTOKEN_CACHE_DIR."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"GPT-2's vocabulary can't be downloaded ({type(error).__name__}): put vocab.json and "
            "merges.txt beside the weights, or fill TIKTOKEN_CACHE_DIR on a machine with a network"
        ) from error
    special = {END_OF_TEXT: encoding.eot_token}
    ordinary = [i for i in range(encoding.n_vocab) if i != encoding.eot_token]
    return BPEFiles({encoding.decode_single_token_bytes(i): i for i in ordinary}, special)
