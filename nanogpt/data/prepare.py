"""Turn a text into tokens for training.

    python -m nanogpt.data.prepare char                       # tinyshakespeare, by character
    python -m nanogpt.data.prepare bpe --out data/shakespeare # tinyshakespeare, GPT-2's byte pairs
    python -m nanogpt.data.prepare char --input my.txt --out data/mine

Writes train.bin and val.bin (uint16, little-endian) and meta.json. As in nanoGPT, the first 90 %
of the characters train and the rest validates.
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
import tiktoken

from nanogpt.data.dataset import Meta
from nanogpt.errors import ConfigError, StartupError
from nanogpt.registry import TokenizerSpec

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


def encode_bpe(parts: tuple[str, str]) -> tuple[TokenizerSpec, int, list[np.ndarray]]:
    """GPT-2's byte pairs; special tokens in the text are ordinary text."""
    encoding = tiktoken.get_encoding("gpt2")
    arrays = [np.array(encoding.encode_ordinary(part), dtype="<u2") for part in parts]
    return TokenizerSpec(kind="gpt2"), encoding.n_vocab, arrays


def prepare(kind: str, content: bytes, source: str, out: Path) -> Meta:
    """Write the data directory of one text, given as UTF-8 bytes; meta.json comes last."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error}; convert it first") from error
    encode = encode_characters if kind == "char" else encode_bpe
    tokenizer, vocab_size, (train, val) = encode(split(text))
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
    train.tofile(out / "train.bin")
    val.tofile(out / "val.bin")
    (out / "meta.json").write_bytes(msgspec.json.format(msgspec.json.encode(meta)) + b"\n")
    return meta


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=("char", "bpe"), help="what a token is")
    parser.add_argument("--input", type=Path, metavar="FILE", help="UTF-8 text (tinyshakespeare)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="data/shakespeare_<kind>")
    args = parser.parse_args(argv)
    try:
        if args.input is None:
            content, source = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256), "tinyshakespeare"
        else:
            content, source = _read(args.input), args.input.stem
        out = args.out or Path("data") / f"shakespeare_{args.kind}"
        meta = prepare(args.kind, content, source, out)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(
        f"{out}: {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens "
        f"of {meta.vocab_size:,} kinds"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
