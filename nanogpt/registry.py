"""What is known of a model without its weights: name, limits, tokenizer, where it comes from."""

import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from nanogpt.config import PROJECT, convert, nearest, read_toml
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.weight_files import cached, cached_configs, hub_names

CARDS = PROJECT / "configs" / "models"


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to build a tokenizer anywhere, without torch.

    kind "char": `characters[i]` is the text of token i, and there is no end token. `unknown` is
    the character that stands for all others; without it they are an error.
    kind "gpt2": GPT-2's byte pairs; `directory` holds vocab.json and merges.txt (or
    tokenizer.json), or is empty for the files that tiktoken knows (downloaded once, or found in
    TIKTOKEN_CACHE_DIR).
    """

    kind: Literal["char", "gpt2"]
    characters: str = ""
    directory: str = ""
    unknown: str = ""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model as the front end sees it."""

    name: str
    context_length: int  # tokens of prompt and completion together
    vocab_size: int  # ids the tokenizer has; padding rows are never sampled
    eos_token_id: int | None
    start_token_id: int  # stands for an empty prompt
    tokenizer: TokenizerSpec
    dtype: str
    fingerprint: str  # of weights and dtype, hexadecimal
    created: int  # seconds since the epoch
    num_parameters: int


class CardShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The network of a card."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    bias: bool = True


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of configs/models/: a model that can be served by its name alone."""

    name: str
    hub: str = ""  # its name on the Hugging Face hub, or
    directory: str = ""  # its place in this project
    recipe: str = ""  # in configs/train/, when the directory has to be trained first
    base: str = ""  # the model of byte pairs from which the recipe starts
    aliases: tuple[str, ...] = ()
    tokenizer: Literal["char", "gpt2"]
    unknown: str = ""  # what a character model reads for one that it does not know; none: an error
    context: int  # tokens
    shape: CardShape
    dtype: Literal["float32", "bfloat16", "float16"]  # of the weights as they are stored
    licence: str
    notes: str = ""

    def __post_init__(self) -> None:
        if bool(self.hub) == bool(self.directory):
            raise ValueError("a model comes from `hub` or from `directory`: give one of them")
        if bool(self.base) != bool(self.recipe and self.tokenizer == "gpt2"):
            raise ValueError("`base` is for a recipe with GPT-2's byte pairs, which needs one")
        if self.unknown and (self.tokenizer != "char" or len(self.unknown) != 1):
            raise ValueError("`unknown` is one character, and for a tokenizer of characters")

    @property
    def parameters(self) -> int:
        """How many, with the tied head counted once."""
        s = self.shape
        shape = _Shape(s.n_layer, s.n_embd, s.vocab_size, self.context, bias=s.bias)
        return shape.num_parameters()

    @property
    def stored_bytes(self) -> int:
        """Of the weights' file."""
        return self.parameters * _ITEM_SIZE[self.dtype]

    @property
    def modified(self) -> int | None:
        """When the weights came here, in seconds since the epoch; None when they are not here."""
        directory = cached(self.hub) if self.hub else PROJECT / self.directory
        try:
            return None if directory is None else int((directory / "config.json").stat().st_mtime)
        except OSError:
            return None

    @property
    def command(self) -> str:
        """What brings the weights here; empty for what is bundled."""
        if self.hub:
            return f"nanogpt fetch {self.name}"
        if not self.recipe:
            return ""
        train = f"nanogpt train --config {self.recipe}"
        if self.tokenizer == "char":
            return f"nanogpt prepare char && {train}"
        tokens = f"nanogpt prepare bpe --tokenizer-of {self.base}"
        return f"nanogpt fetch {self.base} && {tokens} && {train}"


def read_cards(directory: Path = CARDS) -> dict[str, ModelCard]:
    """The cards by name. Raises ConfigError for a bad card, or when two share a name or alias."""
    cards: dict[str, ModelCard] = {}
    taken: dict[str, Path] = {}
    for path in sorted(directory.glob("*.toml")):
        card = convert(read_toml(path), ModelCard, source=str(path))
        for name in (card.name, *card.aliases):
            if name in taken:
                raise ConfigError(f"{path} and {taken[name]} both have a model {name!r}")
            taken[name] = path
        cards[card.name] = card
    return cards


def aliases(served: Iterable[str], cards: Mapping[str, ModelCard]) -> dict[str, str]:
    """Other names of the served models, where no served model has that very name."""
    names = set(served)
    return {
        alias: name
        for name in names & cards.keys()
        for alias in cards[name].aliases
        if alias not in names
    }


_NAME = re.compile(r"[\w.:@+-]+(/[\w.:@+-]+)*", re.ASCII)  # it stands in a URL
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".json")


def resolve(model: str, cards: Mapping[str, ModelCard]) -> tuple[str, str]:
    """Name and source of "NAME" (or an alias), by the cards, or "NAME=PATH". Raises ConfigError."""
    name, equals, given = (part.strip() for part in model.partition("="))
    if not equals:
        return _from_card(name, cards)
    if not _NAME.fullmatch(name) or len(name) > 128:
        raise ConfigError(
            f"model name {name!r:.150}: use 1 to 128 letters, digits and . _ - : @ + /"
        )
    if not given:
        raise ConfigError(f"model {name!r} has no path after the equals sign")
    path = Path(given).expanduser()
    return name, str(path.absolute()) if path.exists() else str(path)


def find_card(name: str, cards: Mapping[str, ModelCard]) -> ModelCard | None:
    """The card of a name or alias."""
    return cards.get(name) or next((c for c in cards.values() if name in c.aliases), None)


def _from_card(name: str, cards: Mapping[str, ModelCard]) -> tuple[str, str]:
    card = find_card(name, cards)
    if card is None:
        if Path(name).expanduser().exists():
            raise ConfigError(f"model {name!r:.150} is a path: give it a name, --model NAME=PATH")
        names = [each for c in cards.values() for each in (c.name, *c.aliases)]
        raise ConfigError(
            f"unknown model {name!r:.150}{nearest(name, names)} "
            f"(known are {', '.join(cards)}; any other is given as NAME=PATH)"
        )
    if card.hub:
        return card.name, card.hub
    path = PROJECT / card.directory
    if not path.exists():
        mend = f"; get it with: {card.command}" if card.command else ""
        raise ConfigError(f"model {card.name!r}: {path} is not there{mend}")
    return card.name, str(path)


def any_source(given: str) -> tuple[str, str]:
    """Name and source of what a command is given: a known name, or else a path or a name on the
    hub as it is. Raises ConfigError."""
    cards = read_cards()
    return _from_card(given, cards) if find_card(given, cards) else (Path(given).name, given)


def unknown_character(name: str, cards: Mapping[str, ModelCard]) -> str:
    """What a served model reads for characters that it does not know, by its card; "" for none."""
    return cards[name].unknown if name in cards else ""


def is_hub_name(source: str) -> bool:
    """Whether a source that isn't a path here may be a name on the Hugging Face hub."""
    return bool(_HUB_NAME.fullmatch(source)) and not source.endswith(_FILE_ENDINGS)


def check_source(name: str, source: str) -> None:
    """Raises CheckpointError for what can be seen at once, without reading the weights."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"model {name!r}: {path} has no config.json; give a directory of ours, of Hugging "
                "Face's GPT-2, or a nanoGPT ckpt.pt"
            )
    elif path.is_file():
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"model {name!r}: {path} is not a file that torch.save wrote")
    elif not is_hub_name(source):
        raise CheckpointError(f"model {name!r}: there is no file or directory {path}")


def sources(models: Iterable[str]) -> list[tuple[str, str]]:
    """Name and source of each configured model. Raises ConfigError, also for a name given twice."""
    cards = read_cards()
    found: dict[str, str] = {}
    for model in models:
        name, source = resolve(model, cards)
        if name in found:
            raise ConfigError(f"model {name!r} is given twice; give one of them another name")
        found[name] = source
    return list(found.items())


# With int8, the embeddings keep 16 bits beside the head's 8.
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2}


class _Shape(msgspec.Struct):
    """What config.json or model_args say; our names or else Hugging Face's."""

    n_layer: int
    n_embd: int
    vocab_size: int
    block_size: int = 0
    n_positions: int = 1024
    bias: bool = True

    def num_parameters(self) -> int:
        """Embeddings, then for each layer 12 matrices of n_embd squared and its vectors."""
        width, vectors = self.n_embd, 13 if self.bias else 2
        embeddings = (self.vocab_size + (self.block_size or self.n_positions)) * width
        layer = 12 * width * width + vectors * width
        return embeddings + self.n_layer * layer + (1 + self.bias) * width


def estimate_memory(source: str, dtype: str) -> int | None:
    """Bytes of the weights in `dtype`, from headers and configuration files alone.

    None when the model has to be downloaded first and no card knows its size. Raises
    CheckpointError when the source says nothing that can be understood.
    """
    parameters = _parameters(source)
    return None if parameters is None else parameters * _ITEM_SIZE[dtype]


def _parameters(source: str) -> int | None:
    path = Path(source)
    if path.is_dir():
        return _config_shape(path / "config.json").num_parameters()
    if path.is_file():
        return _pickled_shape(path).num_parameters()
    for config in cached_configs(source):
        return _config_shape(config).num_parameters()
    names = hub_names(source)
    return next((c.parameters for c in read_cards().values() if c.hub in names), None)


def _config_shape(path: Path) -> _Shape:
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return msgspec.convert(raw.get("model", raw), _Shape)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path} does not describe a GPT-2 model: {error}") from error


def _pickled_shape(path: Path) -> _Shape:
    """nanoGPT's model_args: read from the pickle's opcodes, of which none is carried out."""
    found: dict[str, Any] = {}
    key = ""
    try:
        with zipfile.ZipFile(path) as file:
            pickled = next(n for n in file.namelist() if n.endswith("/data.pkl"))
            for opcode, value, _ in pickletools.genops(file.read(pickled)):
                if opcode.name == "BINUNICODE":
                    key = str(value)
                elif opcode.name.startswith("BININT"):
                    found.setdefault(key, value)
                elif opcode.name in ("NEWTRUE", "NEWFALSE"):
                    found.setdefault(key, opcode.name == "NEWTRUE")
        return msgspec.convert(found, _Shape)
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: {error}") from error
