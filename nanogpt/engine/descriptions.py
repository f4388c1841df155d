"""What is known of a model once it was loaded, kept so that it need not be loaded to be offered.

A server offers models that are not in memory: requests are checked, and their prompts tokenised,
before that. Of these it has to know the tokenizer and the fingerprint, which takes reading all
weights once; from then on a file has it, until the weights' files change.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from nanogpt import __version__
from nanogpt.model.gpt import GPTConfig
from nanogpt.model.load import LoadedModel
from nanogpt.registry import ModelInfo
from nanogpt.weight_files import cached

log = logging.getLogger(__name__)


class Description(msgspec.Struct, frozen=True):
    info: ModelInfo
    shape: GPTConfig

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Description":
        return cls(loaded.info, loaded.model.config)


class Descriptions:
    """Kept in a file; one process writes. A file that can't be read is one that is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, Description])
        except (OSError, msgspec.MsgspecError):
            self._known = {}

    def find(
        self, name: str, source: str, how: str, load: Callable[[], LoadedModel]
    ) -> Description:
        """Of the model as it is now. `how` stands for whatever else makes it another one. Raises
        what `load` does."""
        known = self._known.get(_key(name, source, how))
        if known is not None:
            return known
        log.info("reading the weights of %s, to know it", name)
        return self.add(source, how, load())

    def add(self, source: str, how: str, loaded: LoadedModel) -> Description:
        """Of a model that is loaded."""
        description = Description.of(loaded)
        key = _key(loaded.info.name, source, how)
        if self._known.get(key) != description:
            self._known[key] = description
            new = self._path.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(self._known))
            new.replace(self._path)
        return description


def _key(name: str, source: str, how: str) -> str:
    path = Path(source).expanduser()
    place = path if path.exists() else cached(source)
    files: list[Path] = []
    if place is not None:
        files = sorted((place if place.is_dir() else place.parent).iterdir())
    seen = [(str(f), s.st_size, s.st_mtime_ns) for f in files if (s := _stat(f)) is not None]
    text = repr((__version__, name, source, how, seen))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # it has just gone, or is a link to nowhere
        return None
