"""Download a model's weights into the Hugging Face hub's cache, and check them.

    nanogpt fetch gpt2 gpt2-xl

A MODEL is a name of configs/models/, an alias, or a name on the hub. A download that was cut off
goes on where it ended. HF_HOME says where the cache is, HF_ENDPOINT which hub to ask, and HF_TOKEN
is for private models.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from nanogpt import registry
from nanogpt.errors import CheckpointError, ConfigError, StartupError
from nanogpt.model import hub
from nanogpt.model.hub_blob import begun_bytes
from nanogpt.registry import ModelCard
from nanogpt.weight_files import cached

GB = 10**9


def fetch(model: str, cards: Mapping[str, ModelCard]) -> Path:
    """The directory of a model's weights, here and unharmed. Raises StartupError."""
    card = registry.find_card(model, cards)
    if card is not None and not card.hub:
        return _at_home(card)
    name = card.hub if card is not None else model
    if card is None and not registry.is_hub_name(name):
        raise ConfigError(f"{model!r:.150} is neither a known model nor a name on the hub")
    directory = cached(name)
    if directory is None:
        if card is not None:
            _check_room(card)
        return hub.find(name)
    hub.add_tokenizer(directory)
    total = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=None) as bar:
        hub.verify(directory, bar.update)
    return directory


def _at_home(card: ModelCard) -> Path:
    directory = registry.PROJECT / card.directory
    if card.modified is not None:
        return directory
    raise CheckpointError(f"{card.name} can't be downloaded: train it with: {card.command}")


def _check_room(card: ModelCard) -> None:
    """Raises CheckpointError when the disk of the cache can't take the weights."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    needed, free = card.stored_bytes - begun_bytes(card.hub), shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{card.name} takes {needed / GB:.1f} GB, and {place} has {free / GB:.1f} GB free: "
            "make room, or set HF_HOME to a directory on another disk"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nanogpt fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    args = parser.parse_args(argv)
    try:
        cards = registry.read_cards()
        for model in args.models:
            print(f"{model}: {fetch(model, cards)}", flush=True)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
