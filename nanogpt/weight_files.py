"""Which files a Hugging Face GPT-2 consists of, and whether the hub's cache has them. No torch."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from nanogpt.errors import CheckpointError

# In the order in which transformers prefers them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GPT2_OWNER = "openai-community"


class _Index(msgspec.Struct):
    """Of weights in several parts."""

    weight_map: dict[str, str]


def hub_names(name: str) -> list[str]:
    """Under what names the cache may have a model: GPT-2 was once known without its owner."""
    owner, _, bare = name.rpartition("/")
    other = {"": [f"{GPT2_OWNER}/{bare}"], GPT2_OWNER: [bare]}
    return [name, *other.get(owner, [])]


def weights_file(directory: Path) -> Path | None:
    """The weights, or the index of their parts."""
    return next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)


def read_index(file: Path) -> dict[str, Path]:
    """The file of each tensor, from an index. Raises CheckpointError."""
    try:
        index = msgspec.json.decode(file.read_bytes(), type=_Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"can't read {file}: {error}") from error
    for part in index.weight_map.values():
        if part != Path(part).name:
            raise CheckpointError(f"{file} names {part!r}, which is not a file beside it")
    return {name: file.parent / part for name, part in index.weight_map.items()}


def is_complete(directory: Path) -> bool:
    """Whether the weights are there, all parts of them."""
    file = weights_file(directory)
    if file is None or not file.name.endswith(".index.json"):
        return file is not None
    return all(part.exists() for part in read_index(file).values())


def cached_configs(name: str) -> Iterator[Path]:
    """config.json of a model of the Hugging Face hub, where its cache has that; nothing without
    the hub's client, as on a web server that has no weights of its own."""
    try:
        from huggingface_hub import try_to_load_from_cache  # 0.3 s
    except ImportError:
        return
    for each in hub_names(name):
        config = try_to_load_from_cache(each, "config.json")
        if isinstance(config, str):
            yield Path(config)


def cached(name: str) -> Path | None:
    """The directory of a model of the Hugging Face hub, when its cache has all of it."""
    return next((c.parent for c in cached_configs(name) if is_complete(c.parent)), None)
