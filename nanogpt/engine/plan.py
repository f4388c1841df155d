"""Rank 0's part in which models there are: what is offered, what each takes, what to begin with."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from nanogpt import registry
from nanogpt.config import ServeConfig
from nanogpt.engine.descriptions import Description, Descriptions
from nanogpt.engine.setup import CPU_MOST, GIB, arithmetic
from nanogpt.engine.sizes import Share, Size, share, size_of
from nanogpt.errors import StartupError
from nanogpt.model.load import LoadedModel
from nanogpt.registry import ModelInfo
from nanogpt.servable import check_pinned, servable
from nanogpt.tokenizer import check_vocabulary

log = logging.getLogger(__name__)


class Plan(msgspec.Struct, frozen=True):
    """What all ranks follow: the models to begin with, and the blocks of KV of each model, in
    memory or not. Without a limit there are none: they are planned from what is free after loading.
    """

    begin_with: tuple[str, ...]
    blocks: dict[str, int]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> "Plan":
        return msgspec.msgpack.decode(raw, type=cls)


class Planner:
    """`infos` are of all models that are offered, those first that were asked for; `needs` are the
    bytes that each takes on a rank, for weights and KV. Both are complete after `note`."""

    def __init__(
        self,
        config: ServeConfig,
        device: torch.device,
        known: Path,
        load: Callable[[str], LoadedModel],
        budget: int,
    ) -> None:
        """`known` is where descriptions are kept, `budget` are the bytes for all models in memory
        (0: no limit). Raises ConfigError."""
        self._config, self._device, self._load = config, device, load
        self.budget = budget
        self._sources = dict(servable(config))
        self._asked = [name for name, _ in registry.sources(config.models)]
        check_pinned(config, [*self._sources])
        self._descriptions = Descriptions(known)
        self._how = f"{config.dtype} {device.type} {arithmetic(device)}"
        self._cards = registry.read_cards()
        self.infos: dict[str, ModelInfo] = {}
        self.needs: dict[str, int] = {}

    def plan(self, held: Sequence[str] | None, pinned: Sequence[str]) -> Plan:
        """`held` are the models that an earlier group had in memory, if there was one. Raises
        StartupError."""
        wanted = [*self._config.residency.pinned, *pinned]
        wanted += self._asked if held is None else held
        wanted = [name for name in dict.fromkeys(wanted) if name in self._sources]
        if not self.budget and len(wanted) == len(self._sources):
            return Plan(tuple(wanted), {})  # all are loaded now: nothing has to be known before
        found = self._describe()
        sizes = {name: self._size(each) for name, each in found.items()}
        if self.budget:
            shares = self._fitting(sizes)
        else:
            shares = {name: Share(size.weights, 0) for name, size in sizes.items()}
        self.infos = {name: found[name].info for name in shares}
        self.needs = {name: each.bytes for name, each in shares.items()}
        self._check_pinned_fit()
        blocks = {name: each.blocks for name, each in shares.items()} if self.budget else {}
        return Plan(tuple(self._first(wanted)), blocks)

    def note(self, loaded: Sequence[LoadedModel], blocks: Mapping[str, int]) -> None:
        """What was loaded to begin with, and its blocks of KV."""
        for model in loaded:
            name = model.info.name
            how = self._how_of(name)
            description = self._descriptions.add(self._sources[name], how, model)
            size = self._size(description)
            self.infos[name] = model.info
            kv = blocks[name] * size.context // size.blocks_per_context
            self.needs.setdefault(name, size.weights + kv)
        self.infos = {name: self.infos[name] for name in self._sources if name in self.infos}

    def ordered_needs(self) -> tuple[int, ...]:
        """In the order of `infos`."""
        return tuple(self.needs[name] for name in self.infos)

    def _size(self, each: Description) -> Size:
        return size_of(self._config, self._device, each.info, each.shape)

    def _how_of(self, name: str) -> str:
        """What beside the files decides what a model is."""
        return f"{self._how} {registry.unknown_character(name, self._cards)!r}"

    def _describe(self) -> dict[str, Description]:
        """All models, but for broken ones that nobody asked for."""
        found = {}
        for name, source in self._sources.items():
            try:
                load = functools.partial(self._load, name)
                each = self._descriptions.find(name, source, self._how_of(name), load)
                check_vocabulary(each.info.tokenizer)
                found[name] = each
            except StartupError as error:
                if name in self._asked:
                    raise
                log.warning("%s is not offered: %s", name, error)
        return found

    def _fitting(self, sizes: Mapping[str, Size]) -> dict[str, Share]:
        """Shares of the models that fit into the memory. Raises StartupError for one that was asked
        for and does not."""
        engine = self._config.engine
        kv = engine.kv_memory_gib * GIB
        if not kv:
            kv = CPU_MOST if self._device.type == "cpu" else self.budget
        shares = share(self.budget, int(kv), [*sizes.values()], most_contexts=engine.max_num_seqs)
        fitting = {}
        for (name, size), each in zip(sizes.items(), shares, strict=True):
            if each.blocks:
                fitting[name] = each
                continue
            problem = (
                f"the model {name!r} takes {size.weights / GIB:.2f} GiB of weights and "
                f"{size.context / GIB:.2f} GiB for one context, and there are "
                f"{self.budget / GIB:.3g} GiB for models (residency.memory_gib)"
            )
            if name in self._asked:
                raise StartupError(f"{problem}: raise that, use a smaller dtype, or leave it out")
            log.warning("%s is not offered: %s", name, problem)
        return fitting

    def _check_pinned_fit(self) -> None:
        names = self._config.residency.pinned
        needed = sum(self.needs[name] for name in names)
        if self.budget and needed > self.budget:
            raise StartupError(
                f"the pinned models {', '.join(names)} take {needed / GIB:.2f} GiB together, and "
                f"there are {self.budget / GIB:.3g} GiB for models (residency.memory_gib): raise "
                "that, or pin fewer"
            )

    def _first(self, wanted: Sequence[str]) -> list[str]:
        """Of the wanted models those that fit together, in their order."""
        first, left = [], self.budget
        for name in wanted:
            if name in self.needs and (not self.budget or self.needs[name] <= left):
                first.append(name)
                left -= self.needs[name]
        return first
