"""The clusters behind a queue, as a web server sees them: one cluster."""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from nanogpt.api.backend import ModelStatus
from nanogpt.api.jobs import relay
from nanogpt.errors import (
    CheckpointError,
    ModelNotFound,
    Unavailable,
    draining,
    too_many_choices,
)
from nanogpt.jobs.announce import Clusters, Listener
from nanogpt.jobs.store import Store, StoreUnavailable
from nanogpt.registry import ModelInfo
from nanogpt.request import EngineStats, GenerateRequest
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between two looks at what clusters tell


class RemoteStatus(NamedTuple):
    epoch: int
    ranks: int
    ready: bool
    draining: bool
    detail: str


class RemoteCluster:
    """See nanogpt.api.backend.Cluster. Thread-safe; `start` has it look for clusters."""

    def __init__(
        self,
        store: Store,
        listener: Listener,
        *,
        max_outstanding: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._listener, self._clock = store, listener, clock
        self._max_outstanding = max_outstanding
        self._found = Clusters({}, 0, 0)
        self._problem = "no cluster has announced itself yet"
        self._draining = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clusters", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._found = self._listener.look()
                self._problem = "" if self._found.models else "no cluster has announced itself yet"
            except (StoreUnavailable, CheckpointError) as error:
                if str(error) != self._problem:
                    log.error("%s", error)
                self._problem = str(error)  # what was found before still stands
            self._stop.wait(LOOK_S)

    def models(self) -> dict[str, ModelInfo]:
        return dict(self._found.models)

    def tokenizer(self, model: str) -> Tokenizer:
        """Raises ModelNotFound."""
        try:
            return self._listener.tokenizers[model]
        except KeyError:
            raise ModelNotFound(f"the model {model!r} does not exist", param="model") from None

    def ready(self) -> bool:
        return not self._problem and not self._draining

    def status(self) -> RemoteStatus:
        if self._draining:
            detail = "draining: no new requests are taken"
        elif self._problem:
            detail = self._problem
        elif not self._found.alive:
            detail = "no cluster is alive: requests wait in the queue"
        else:
            detail = "ready"
        return RemoteStatus(0, self._found.ranks, self.ready(), self._draining, detail)

    def stats(self) -> dict[int, tuple[EngineStats, ...]]:
        """None: each cluster tells its own."""
        return {}

    def model_states(self) -> dict[str, ModelStatus]:
        """Each cluster knows its own."""
        return {}

    def submit(
        self, request: GenerateRequest, *, is_patient: bool = False, may_block: bool = True
    ) -> relay.RelayHandle:
        """Raises Unavailable; InvalidRequest for too many choices."""
        if self._draining:
            raise draining()
        count = len(request.prompts) * request.n
        if count > self._max_outstanding:
            raise too_many_choices(count, self._max_outstanding)
        if request.model not in self._found.models:
            raise Unavailable("the model is no longer there; try again soon", code="starting")
        return relay.submit(self._store, request, self._clock())

    def drain(self) -> None:
        self._draining = True
