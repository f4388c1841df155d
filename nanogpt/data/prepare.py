"""Turn a text into tokens for training.

    nanogpt prepare char                          tinyshakespeare, by character
    nanogpt prepare bpe                           tinyshakespeare, by GPT-2's byte pairs
    nanogpt prepare bpe --tokenizer-of out/mine   by the byte pairs of another model
    nanogpt prepare char --input my.txt --out data/mine

Writes train.bin and val.bin (uint16, little-endian), meta.json and the vocabulary's files. As in
nanoGPT, the first 90 % of the characters train and the rest validates.
"""

import argparse
import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from nanogpt import registry
from nanogpt.bpe_files import BPEFiles, has_bpe_files, read_bpe_files
from nanogpt.data.dataset import Meta
from nanogpt.errors import ConfigError, StartupError
from nanogpt.registry import TokenizerSpec
from nanogpt.tokenizer import BPETokenizer, gpt2_files
from nanogpt.weight_files import cached

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_FRACTION = 0.9


def download(url: str, sha256: str) -> bytes:
    """The file at `url`. Raises ConfigError when it can't be had or isn't the expected one."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = bytes(answer.read())
    except (urllib.error.URLError, TimeoutError) as error:
        raise ConfigError(f"can't download {url} ({error}); give the text with --input") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{url} has changed: its SHA-256 is not {sha256}; use --input")
    return content


def read_file(path: Path) -> bytes:
    """Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error


def decoded(content: bytes, source: str) -> str:
    """The text of `source`. Raises ConfigError when it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error}; convert it first") from error


def split(text: str) -> tuple[str, str]:
    """Training and validation text, divided as nanoGPT does."""
    n = len(text)
    return text[: int(n * TRAIN_FRACTION)], text[int(n * TRAIN_FRACTION) :]


def encode_characters(parts: tuple[str, str]) -> tuple[TokenizerSpec, int, list[np.ndarray]]:
    """Ids are ranks in the sorted set of characters, as in nanoGPT."""
    characters = "".join(sorted(set(parts[0] + parts[1])))
    if len(characters) > 2**16:
        raise ConfigError(f"{len(characters)} different characters don't fit in uint16: use bpe")
    ids = {c: i for i, c in enumerate(characters)}
    arrays = [np.array([ids[c] for c in part], dtype="<u2") for part in parts]
    return TokenizerSpec(kind="char", characters=characters), len(characters), arrays


def encode_bpe(
    parts: tuple[str, str], vocabulary: BPEFiles
) -> tuple[TokenizerSpec, int, list[np.ndarray]]:
    """Byte pairs; special tokens in the text are ordinary text."""
    if vocabulary.n_vocab > 2**16:
        raise ConfigError(f"{vocabulary.n_vocab} byte pairs don't fit in uint16")
    tokenizer = BPETokenizer(vocabulary)
    arrays = [np.array(tokenizer.encode_ordinary(part), dtype="<u2") for part in parts]
    return TokenizerSpec(kind="gpt2"), tokenizer.n_vocab, arrays


def vocabulary_of(model: str) -> BPEFiles:
    """The byte pairs of a model that is here. Raises StartupError."""
    _, source = registry.any_source(model)
    directory = Path(source) if Path(source).exists() else cached(source)
    if directory is None:
        raise ConfigError(f"{model} is not here: fetch it first, or give a directory")
    return read_bpe_files(directory) if has_bpe_files(directory) else gpt2_files()


def prepare(
    kind: str, content: bytes, source: str, out: Path, vocabulary: BPEFiles | None = None
) -> Meta:
    """Write the data directory of one text, given as UTF-8 bytes; meta.json comes last. The
    `vocabulary` is that of byte pairs, GPT-2's if it isn't given."""
    text = decoded(content, source)
    files: dict[str, bytes] = {}
    if kind == "char":
        tokenizer, vocab_size, (train, val) = encode_characters(split(text))
    else:
        vocabulary = vocabulary or gpt2_files()
        tokenizer, vocab_size, (train, val) = encode_bpe(split(text), vocabulary)
        files = vocabulary.as_files()
    if not len(train) or not len(val):
        raise ConfigError(f"{source} is too short to be split in training and validation")
    meta = Meta(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train_tokens=len(train),
        val_tokens=len(val),
        source=source,
        source_sha256=hashlib.sha256(content).hexdigest(),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    for name, written in files.items():
        (out / name).write_bytes(written)
    train.tofile(out / "train.bin")
    val.tofile(out / "val.bin")
    (out / "meta.json").write_bytes(msgspec.json.format(msgspec.json.encode(meta)) + b"\n")
    return meta


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nanogpt prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=("char", "bpe"), help="what a token is")
    parser.add_argument("--input", type=Path, metavar="FILE", help="UTF-8 text (tinyshakespeare)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="data/shakespeare_<kind>")
    parser.add_argument(
        "--tokenizer-of", metavar="MODEL", help="whose byte pairs to use: a name or a directory"
    )
    args = parser.parse_args(argv)
    if args.tokenizer_of and args.kind != "bpe":
        parser.error("--tokenizer-of is for bpe")
    try:
        vocabulary = vocabulary_of(args.tokenizer_of) if args.tokenizer_of else None
        if args.input is None:
            content, source = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256), "tinyshakespeare"
        else:
            content, source = read_file(args.input), args.input.stem
        out = args.out or Path("data") / f"shakespeare_{args.kind}"
        meta = prepare(args.kind, content, source, out, vocabulary)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(
        f"{out}: {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens "
        f"of {meta.vocab_size:,} kinds"
    )


if __name__ == "__main__":
    main()
