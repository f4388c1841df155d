"""What all ranks answer to the loading and unloading of models, told to the residency as one."""

import logging
from collections.abc import Callable

from nanogpt.cluster.messages import (
    LoadModel,
    Message,
    ModelAnswer,
    ModelFailed,
    ModelLoaded,
    UnloadModel,
)
from nanogpt.cluster.residency import Load, Residency, Unload
from nanogpt.registry import ModelInfo

log = logging.getLogger(__name__)


class Changes:
    """Of one group's models. `on_loaded` gets what is known of a model once all ranks have it."""

    def __init__(self, residency: Residency, on_loaded: Callable[[ModelInfo], None]) -> None:
        self._residency, self._on_loaded = residency, on_loaded
        self._world_size = 0
        self._held: dict[str, set[int]] = {}
        self._answers: dict[str, dict[int, ModelAnswer]] = {}  # by model, of the present change

    def greet(self, world_size: int) -> None:
        """A group has come, whose ranks are about to join."""
        self._world_size = world_size
        self._held, self._answers = {}, {}

    def join(self, rank: int, models: tuple[str, ...]) -> None:
        """What a rank has in memory."""
        for name in models:
            self._held.setdefault(name, set()).add(rank)

    def begin(self, now: float) -> None:
        """All ranks have joined."""
        held = {name: len(ranks) == self._world_size for name, ranks in self._held.items()}
        self._residency.begin(held, now)

    def command(self, action: Load | Unload, epoch: int) -> Message:
        """What the ranks are to be told; their answers are awaited from here on."""
        self._answers[action.model] = {}
        kind = LoadModel if isinstance(action, Load) else UnloadModel
        return kind(epoch, action.model)

    def answer(self, answer: ModelAnswer, now: float) -> None:
        """Of one rank. What nobody waits for any more is dropped."""
        name = answer.info.name if isinstance(answer, ModelLoaded) else answer.model
        answers = self._answers.get(name)
        if answers is None:
            return
        answers[answer.rank] = answer
        if len(answers) < self._world_size:
            return
        del self._answers[name]
        loaded = [a for a in answers.values() if isinstance(a, ModelLoaded)]
        failed = [a for a in answers.values() if isinstance(a, ModelFailed)]
        if failed:
            problem = failed[0].message
        elif len({each.info.fingerprint for each in loaded}) > 1:
            problem = "the ranks have different weights: use the same files everywhere"
        elif loaded:
            seconds = max(each.seconds for each in loaded)
            log.info("%s is loaded on all ranks, %.2f s", name, seconds)
            self._on_loaded(min(loaded, key=lambda each: each.rank).info)
            self._residency.loaded(name, now, seconds)
            return
        else:
            log.info("%s is unloaded on all ranks", name)
            self._residency.unloaded(name)
            return
        log.error("%s can't be loaded: %s", name, problem)
        self._residency.failed(name, now, problem)
