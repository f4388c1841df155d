"""Models by their name on the Hugging Face hub, in the cache that transformers uses as well."""

import logging
from pathlib import Path

from nanogpt.errors import CheckpointError
from nanogpt.model.huggingface import read_index, weights_file
from nanogpt.registry import hub_names

log = logging.getLogger(__name__)

_CONFIG = ["config.json", "vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_TORCH = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def find(name: str) -> Path:
    """The directory of a model: from the cache without touching the network, else downloaded.

    Raises CheckpointError when it can't be had.
    """
    return next(filter(None, map(_cached, hub_names(name))), None) or _download(name)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return (
        Path(config).parent if isinstance(config, str) and _complete(Path(config).parent) else None
    )


def _complete(directory: Path) -> bool:
    file = weights_file(directory)
    if file is None or not file.name.endswith(".index.json"):
        return file is not None
    return all(part.exists() for part in read_index(file).values())


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    log.info("%s is not in the cache: downloading it from the Hugging Face hub", name)
    try:
        directory = Path(snapshot_download(name, allow_patterns=_CONFIG + _SAFETENSORS))
        if weights_file(directory) is None:
            revision = directory.name  # the same commit, whatever happened meanwhile
            snapshot_download(name, revision=revision, allow_patterns=_TORCH)
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name!r} is neither a path here, nor cached, nor to be had from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or download it elsewhere "
            "and give the directory, --model NAME=PATH"
        ) from error
    if not _complete(directory):
        raise CheckpointError(
            f"{name!r} was not downloaded completely ({directory}): check the network and the disk"
        )
    return directory
