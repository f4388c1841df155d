"""Models by their name on the Hugging Face hub, in the cache that transformers uses as well."""

import errno
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanogpt.bpe_files import has_bpe_files
from nanogpt.errors import CheckpointError
from nanogpt.model.hub_blob import fetch_blob
from nanogpt.weight_files import cached, is_complete

log = logging.getLogger(__name__)

_CONFIG = ["config.json", "vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_TORCH = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_CHUNK = 2**22  # bytes hashed at a time


def find(name: str) -> Path:
    """The directory of a model: from the cache without touching the network, else downloaded.

    What an earlier download left unfinished goes on where that ended, and what has arrived is
    compared with its checksums. Raises CheckpointError when it can't be had.
    """
    directory = cached(name)
    if directory is None:
        directory = _download(name)
        verify(directory)
    return directory


def add_tokenizer(directory: Path) -> None:
    """Have the tokenizer's files beside the weights of a snapshot of the cache, which another
    program may have left out. Raises CheckpointError when they can't be had."""
    if has_bpe_files(directory) or directory.parent.name != "snapshots":
        return
    from huggingface_hub import snapshot_download

    name = directory.parents[1].name.removeprefix("models--").replace("--", "/")
    with _told(name):
        snapshot_download(name, revision=directory.name, allow_patterns=_CONFIG)


def _download(name: str) -> Path:
    log.info("%s is not in the cache: downloading it from the Hugging Face hub", name)
    with _told(name):
        directory = _snapshot(name)
    if not is_complete(directory):
        raise CheckpointError(
            f"{name!r} was not downloaded completely ({directory}): check the network and the disk"
        )
    return directory


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What goes wrong while something is downloaded, as one line."""
    import httpx2  # what huggingface_hub speaks through
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise CheckpointError(
                f"the disk is full while {name!r} is downloaded: make room, and the same command "
                "goes on from here; HF_HOME says where the cache is"
            ) from error
        raise CheckpointError(
            f"{name!r} is neither a path here, nor cached, nor to be had from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or download it elsewhere "
            "and give the directory, --model NAME=PATH"
        ) from error


def _snapshot(name: str) -> Path:
    """The directory of today's commit, with everything that we need of it."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    directory = Path(snapshot_download(name, allow_patterns=_CONFIG))
    revision = directory.name  # the same commit, whatever happens meanwhile
    files = list_repo_files(name, revision=revision)
    weights = [*filter_repo_objects(files, allow_patterns=_SAFETENSORS)]
    weights = weights or [*filter_repo_objects(files, allow_patterns=_TORCH)]
    for file in weights:
        fetch_blob(name, revision, file)
    if weights:
        snapshot_download(name, revision=revision, allow_patterns=weights)
    return directory


def verify(directory: Path, progress: Callable[[int], object] = lambda count: None) -> None:
    """Compare a snapshot of the cache with the hub's checksums; `progress` gets bytes as they are
    read. Raises CheckpointError for damage, after removing it, so that it is downloaded again.

    The cache names each file's content by what the hub calls it: the SHA-256 of a large file, or
    git's SHA-1 of a small one. Files of other names, as a plain copy has, can't be compared.
    """
    for file in sorted(directory.iterdir()):
        blob = file.resolve()
        digest = _digest(blob, progress) if blob != file and blob.is_file() else None
        if digest is not None and digest != blob.name:
            blob.unlink()
            file.unlink()
            raise CheckpointError(
                f"{file.name} was damaged: its checksum is {digest}, the hub says {blob.name}. "
                "It has been removed; run the same command again"
            )


def _digest(blob: Path, progress: Callable[[int], object]) -> str | None:
    """What the content's name should be, or None for a name that is no checksum."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        made = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        made = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return None
    with open(blob, "rb") as file:
        while chunk := file.read(_CHUNK):
            made.update(chunk)
            progress(len(chunk))
    return made.hexdigest()
