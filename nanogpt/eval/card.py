"""The result as a table, and its place in a model's card."""

import re
from pathlib import Path

from nanogpt.errors import ConfigError
from nanogpt.eval.score import Score, Window
from nanogpt.eval.text import PARTS, Part, Text
from nanogpt.model.checkpoint import CARD
from nanogpt.registry import ModelInfo

HEADING = "## Evaluation"


def table(
    result: Score, info: ModelInfo, text: Text, part: Part, windows: list[Window], stride: int
) -> str:
    """In Markdown."""
    cut = f"{len(windows):,} of {info.context_length} tokens, "
    cut += f"one every {stride} tokens" if stride else "consecutive"
    rows = {
        "text": f"{text.name}, {PARTS[part]}, SHA-256 of the whole `{text.sha256}`",
        "loss": f"{result.loss:.4f} nats a token",
        "perplexity": f"{result.perplexity:.3f} a token",
        "bits per character": f"{result.bits_per_character:.4f}",
        "bits per byte": f"{result.bits_per_byte:.4f}",
        "tokens": f"{result.tokens:,} of {len(text.tokens):,}",
        "windows": cut,
        "weights": f"{info.dtype}, fingerprint {info.fingerprint}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def write(directory: Path, content: str, command: str) -> None:
    """Put a table into the card of a checkpoint, in the place of the last one. Raises
    ConfigError."""
    path = directory / CARD
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read the card {path}: {error.strerror}") from error
    section = f"{HEADING}\n\n{content}\n\nWritten by `{command}`.\n"
    found = re.search(rf"^{HEADING}\n.*?(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
    if found is None:
        path.write_text(f"{old.rstrip()}\n\n{section}", encoding="utf-8")
        return
    rest = old[found.end() :]
    path.write_text(old[: found.start()] + section + ("\n" if rest else "") + rest, "utf-8")
