"""The models of one rank: what it begins with, and what comes and goes later."""

import gc
import logging
import os
import threading
import time
from typing import NamedTuple

import torch

from nanogpt import process
from nanogpt.config import ServeConfig
from nanogpt.engine.engine import Engine
from nanogpt.engine.plan import Plan
from nanogpt.engine.setup import build_engine, load, plan_loaded
from nanogpt.errors import EngineError, StartupError
from nanogpt.model.load import LoadedModel
from nanogpt.ranks import Ranks
from nanogpt.servable import servable
from nanogpt.tokenizer import check_vocabulary

log = logging.getLogger(__name__)

NICENESS = 5  # of the thread that loads, so that what runs meanwhile goes before it


class Arrival(NamedTuple):
    """The end of loading a model: an engine, or the reason why there is none."""

    name: str
    engine: Engine | None
    problem: str
    seconds: float


class Models:
    """Makes and drops engines. For the thread that runs them."""

    def __init__(self, config: ServeConfig, ranks: Ranks, device: torch.device) -> None:
        """Raises ConfigError."""
        self._config, self._ranks, self._device = config, ranks, device
        self._sources = dict(servable(config))
        self._blocks: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._arrival: Arrival | None = None

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks of KV, of each model for which they are planned."""
        return dict(self._blocks)

    def load(self, name: str) -> LoadedModel:
        """Raises CheckpointError, StartupError."""
        loaded = load(self._config, name, self._sources[name], self._device)
        check_vocabulary(loaded.info.tokenizer)  # which the front end needs
        return loaded

    def open(self, plan: Plan) -> tuple[dict[str, Engine], list[LoadedModel]]:
        """The engines to begin with, warmed up, and their models. Raises StartupError."""
        started = time.monotonic()
        self._blocks = dict(plan.blocks)
        try:
            loaded = [self.load(name) for name in plan.begin_with]
            if loaded and not plan.blocks:
                self._blocks = plan_loaded(self._config, self._ranks, self._device, loaded)
            engines = {m.info.name: self._build(m) for m in loaded}
        except torch.OutOfMemoryError as error:
            raise StartupError(
                f"too little memory on {self._device} for {', '.join(plan.begin_with)}: serve "
                "fewer models, use a smaller dtype, or set engine.kv_memory_gib lower"
            ) from error
        for engine in engines.values():
            engine.warm_up()
        gc.collect()
        gc.freeze()  # what is loaded stays: no need to look at it again and again
        names = ", ".join(f"{m.info.name} ({m.info.dtype})" for m in loaded) or "no model yet"
        log.info("%s on %s, %.1f s", names, self._device, time.monotonic() - started)
        return engines, loaded

    @property
    def is_loading(self) -> bool:
        return self._thread is not None or self._arrival is not None

    def begin(self, name: str) -> None:
        """Load a model; `finished` has it in a while. On a GPU this call takes all the time: steps
        are recorded there, which nothing else may disturb."""
        assert not self.is_loading, "one model at a time"
        log.info("loading %s", name)
        if self._device.type != "cpu":
            self._arrival = self._arrive(name)
            return
        self._thread = threading.Thread(target=self._run, args=(name,), name="loader", daemon=True)
        self._thread.start()

    def finished(self, *, wait: bool = False) -> Arrival | None:
        """What became of the model that was loading, once; None while it still is."""
        if self._thread is not None:
            if self._thread.is_alive() and not wait:
                return None
            self._thread.join()
        arrival, self._thread, self._arrival = self._arrival, None, None
        if arrival is not None and arrival.engine is None:
            log.error("could not load %s: %s", arrival.name, arrival.problem)
            process.give_back_memory()
        elif arrival is not None:
            log.info("loaded %s, %.2f s", arrival.name, arrival.seconds)
        return arrival

    def drop(self, engine: Engine) -> None:
        """Give an engine's memory back. Nothing may run on it."""
        engine.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        process.give_back_memory()
        log.info("unloaded %s", engine.info.name)

    def _run(self, name: str) -> None:
        """The thread: for Linux it has a priority of its own, as have those that it starts."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._arrival = self._arrive(name)

    def _arrive(self, name: str) -> Arrival:
        started = time.monotonic()
        try:
            engine = self._make(name)
        except (StartupError, EngineError, torch.OutOfMemoryError) as error:
            return Arrival(name, None, str(error), 0.0)
        except Exception as error:  # such as a file that changes while it is read
            log.exception("loading %s failed", name)
            return Arrival(name, None, f"{type(error).__name__}: {error}", 0.0)
        return Arrival(name, engine, "", time.monotonic() - started)

    def _make(self, name: str) -> Engine:
        loaded = self.load(name)
        if name not in self._blocks:
            self._blocks |= plan_loaded(self._config, self._ranks, self._device, [loaded])
        engine = self._build(loaded)
        engine.warm_up()
        return engine

    def _build(self, loaded: LoadedModel) -> Engine:
        return build_engine(
            loaded, self._blocks[loaded.info.name], self._config, self._ranks, self._device
        )
