"""What GET /v1/models lists: the models that are served, then those that have a card only."""

from collections.abc import Iterable, Mapping

from nanogpt import __version__
from nanogpt.api.backend import ModelStatus
from nanogpt.api.objects import Model, ModelState
from nanogpt.registry import ModelCard, ModelInfo

# As clients are told it, by the state of ModelStatus.
STATES: dict[str, ModelState] = {
    "absent": "available",
    "loading": "loading",
    "open": "loaded",
    "draining": "unloading",
    "unloading": "unloading",
}


def system_fingerprint(info: ModelInfo) -> str:
    """Weights, dtype and engine version: the scope of the promise about seed."""
    return f"fp_{info.fingerprint}_{__version__}"


def listed(
    infos: Mapping[str, ModelInfo],
    cards: Mapping[str, ModelCard],
    served: Iterable[str],
    states: Mapping[str, ModelStatus],
) -> list[Model]:
    """Served ones first, so that a client which takes the first gets an answer. Empty before any
    model is served; `served` are the names of all of them, also of those not to be shown."""
    names = set(served)
    rest = [cards[name] for name in sorted(cards.keys() - names)] if names else []
    shown = [offered(infos[name], cards, states) for name in sorted(infos)]
    return [*shown, *map(not_offered, rest)]


def offered(
    info: ModelInfo, cards: Mapping[str, ModelCard], states: Mapping[str, ModelStatus]
) -> Model:
    card = cards.get(info.name)
    return Model(
        id=info.name,
        created=info.created,
        context_length=info.context_length,
        dtype=info.dtype,
        num_parameters=info.num_parameters,
        system_fingerprint=system_fingerprint(info),
        # A web server does not know: whoever has the model sees to its being loaded.
        state=STATES[states[info.name].state] if info.name in states else "loaded",
        aliases=[*card.aliases] if card else [],
        licence=card.licence if card else None,
        notes=card.notes if card else None,
    )


def not_offered(card: ModelCard) -> Model:
    here = card.modified
    return Model(
        id=card.name,
        created=here or 0,
        context_length=card.context,
        dtype=card.dtype,
        num_parameters=card.parameters,
        system_fingerprint=None,
        state="not_available" if here is None else "available",
        aliases=[*card.aliases],
        licence=card.licence,
        notes=card.notes,
        command=None if here is not None else card.command or None,
    )


def not_served(card: ModelCard) -> str:
    """Why a model with a card does not answer, and what to do about that."""
    start = f"start the server with --model {card.name}"
    if card.modified is not None:
        return f"is not loaded: {start}"
    get = f"; get it with `{card.command}`, and {start}" if card.command else ""
    return f"is not available: its weights are not here{get}"
