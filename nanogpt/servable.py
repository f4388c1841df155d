"""Which models a server offers: those of its configuration, and with a limit to the memory of
models also those of configs/models/ whose weights are here."""

from collections.abc import Mapping, Sequence

from nanogpt import registry
from nanogpt.config import ServeConfig
from nanogpt.errors import ConfigError, StartupError

GIB = 2**30
MODELS_SHARE = 0.8  # of a device's free memory, with residency.memory_gib = "auto"


def servable(config: ServeConfig) -> list[tuple[str, str]]:
    """Name and source of each model, those first that were asked for. Raises ConfigError."""
    asked = registry.sources(config.models)
    if not config.residency.memory_gib:
        return asked
    names = {name for name, _ in asked}
    cards = registry.read_cards()
    here = [name for name, card in cards.items() if name not in names and card.modified is not None]
    return asked + [registry.resolve(name, cards) for name in here]


def check_pinned(config: ServeConfig, names: Sequence[str]) -> None:
    """Raises ConfigError when a model is to be pinned that is not offered."""
    for name in config.residency.pinned:
        if name not in names:
            raise ConfigError(
                f"residency.pinned has {name!r}, which is not served; there are: {', '.join(names)}"
            )


def check_weights(limit: int, sizes: Mapping[str, int]) -> None:
    """Raises StartupError when the weights of a model that was asked for, in bytes, are more than
    the memory of all models."""
    for name, size in sizes.items():
        if size > limit:
            raise StartupError(
                f"the weights of {name!r} take {size / GIB:.2f} GiB, and there are "
                f"{limit / GIB:.3g} GiB for models (residency.memory_gib): raise that, use a "
                "smaller dtype, or leave the model out"
            )
