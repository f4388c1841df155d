"""The files of a byte-pair vocabulary: GPT-2's vocab.json and merges.txt, or tokenizer.json."""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nanogpt.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"


class BPEFiles(NamedTuple):
    """`ranks` are the ids of mergeable byte strings: the lower of two pairs is merged first."""

    ranks: dict[bytes, int]
    special: dict[str, int]

    @property
    def n_vocab(self) -> int:
        return len(self.ranks) + len(self.special)

    @property
    def end_of_text(self) -> int:
        return self.special[END_OF_TEXT]

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id, in order."""
        by_id = {i: b for b, i in self.ranks.items()}
        by_id |= {i: text.encode() for text, i in self.special.items()}
        return [by_id[i] for i in range(self.n_vocab)]

    def as_files(self) -> dict[str, bytes]:
        """Contents of vocab.json and merges.txt, and of added_tokens.json when there are more."""
        symbols = {b: s for s, b in byte_symbols().items()}
        text = {token: "".join(symbols[b] for b in token) for token in self.ranks}
        vocab = {text[token]: i for token, i in self.ranks.items()}
        vocab |= {END_OF_TEXT: self.end_of_text}
        merged = sorted((t for t in self.ranks if len(t) > 1), key=self.ranks.__getitem__)
        lines = [" ".join(text[part] for part in self._halves(token)) for token in merged]
        files = {
            "vocab.json": msgspec.json.encode(dict(sorted(vocab.items(), key=lambda x: x[1]))),
            "merges.txt": "\n".join(["#version: 0.2", *lines, ""]).encode(),
        }
        added = {text: i for text, i in self.special.items() if text != END_OF_TEXT}
        return files | ({"added_tokens.json": msgspec.json.encode(added)} if added else {})

    def _halves(self, token: bytes) -> list[bytes]:
        """The two tokens of which this one is merged: what the earlier merges make of its bytes."""
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [a + b for a, b in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], len(self.ranks)))
            parts[at : at + 2] = [pairs[at]]
        return parts


def has_bpe_files(directory: Path) -> bool:
    old = (directory / "vocab.json").exists() and (directory / "merges.txt").exists()
    return old or (directory / "tokenizer.json").exists()


def read_bpe_files(directory: str | Path) -> BPEFiles:
    """Raises CheckpointError when it isn't a vocabulary of GPT-2's kind."""
    path = Path(directory)
    if (path / "vocab.json").exists():
        vocab = _read(path / "vocab.json", dict[str, int])
        merges = _read_merges(path / "merges.txt")
        extra = path / "added_tokens.json"
        added = _read(extra, dict[str, int]) if extra.exists() else {}
        where = path / "vocab.json"
    else:
        where = path / "tokenizer.json"
        vocab, merges, added = _read_tokenizer_json(where)
    if END_OF_TEXT in vocab:
        added = {END_OF_TEXT: vocab[END_OF_TEXT]} | added
    if END_OF_TEXT not in added:
        raise CheckpointError(f"{where} has no {END_OF_TEXT}: only GPT-2's vocabulary is supported")
    ordinary = {text: i for text, i in vocab.items() if text not in added}
    files = BPEFiles(_ranks(where, ordinary, merges), added)
    if {*files.ranks.values(), *files.special.values()} != set(range(files.n_vocab)):
        raise CheckpointError(f"{where}: ids must be 0 to n - 1, each once")
    return files


def _read(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer's file: {error}") from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    rules = [line for line in lines if line.strip() and not line.startswith("#version")]
    return [_pair(path, line.split(" ")) for line in rules]


def _pair(where: Path, parts: list[str]) -> tuple[str, str]:
    if len(parts) != 2:
        raise CheckpointError(f"{where}: a merge is two tokens, not {parts!r:.50}")
    return parts[0], parts[1]


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | list[str]]
    type: str = "BPE"


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _TokenizerJson(msgspec.Struct):
    model: _Model
    pre_tokenizer: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


def _read_tokenizer_json(
    path: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    file = _read(path, _TokenizerJson)
    splits = file.pre_tokenizer or {}
    if (
        file.model.type != "BPE"
        or splits.get("type") != "ByteLevel"
        or splits.get("add_prefix_space")
        or not splits.get("use_regex", True)
        or file.normalizer
    ):
        raise CheckpointError(f"{path} is not a tokenizer of GPT-2's kind (byte-level byte pairs)")
    for token in file.added_tokens:
        if token.lstrip or token.rstrip or token.single_word:
            raise CheckpointError(
                f"{path}: the added token {token.content!r} has lstrip, rstrip or single_word, "
                "which is not supported"
            )
    pairs = [_pair(path, m.split(" ") if isinstance(m, str) else m) for m in file.model.merges]
    return file.model.vocab, pairs, {t.content: t.id for t in file.added_tokens}


@functools.cache
def byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself when visible, else from U+0100 on."""
    symbols = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    hidden = [b for b in range(256) if b not in symbols.values()]
    return symbols | {chr(256 + n): b for n, b in enumerate(hidden)}


def _to_bytes(where: Path, symbols: str) -> bytes:
    table = byte_symbols()
    try:
        return bytes([table[s] for s in symbols])
    except KeyError as error:
        raise CheckpointError(
            f"{where}: {symbols!r:.50} is neither of GPT-2's byte alphabet nor an added token"
        ) from error


def _ranks(where: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[bytes, int]:
    """Checks that ids are in the order of the merges, since they serve as priorities."""
    ranks = {_to_bytes(where, text): i for text, i in vocab.items()}
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise CheckpointError(f"{where} has no token for the byte {missing[0]:#04x}")
    last = -1
    for left, right in merges:
        merged = vocab.get(left + right, -1)
        if left not in vocab or right not in vocab or merged <= last:
            raise CheckpointError(
                f"{where}: the merge {left!r} {right!r} is of unknown tokens, or its id is not "
                "in the order of the merges; only GPT-2's kind of vocabulary is supported"
            )
        last = merged
    if len(ranks) != 256 + len(merges):
        raise CheckpointError(
            f"{where} has {len(ranks)} tokens, but 256 bytes and {len(merges)} merges: "
            "the files are of different vocabularies"
        )
    return ranks
