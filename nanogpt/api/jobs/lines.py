"""One line of a batch: the same way as a request, behind everybody else's."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from nanogpt.api import errors
from nanogpt.api.admission import Admission
from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Cluster
from nanogpt.api.caller import Caller
from nanogpt.api.errors import ClientGone
from nanogpt.api.jobs.completions import BATCH_PRIORITY, behind
from nanogpt.api.jobs.gathered import Gathered
from nanogpt.api.jobs.unattended import generate
from nanogpt.api.jobs.whereabouts import Elsewhere, nowhere
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import make_plan, real_name
from nanogpt.api.protocol import CompletionRequest, parse_completion, prompt_count
from nanogpt.api.response import Collected, encode
from nanogpt.errors import ApiError, InvalidRequest, Unavailable
from nanogpt.registry import ModelCard

log = logging.getLogger(__name__)

RETRY_S = 0.5  # after a cluster that was full, or had no room for the model
GATHER_S = 0.25  # how often a line looks for tokens; its end is told at once


class LineAnswer(NamedTuple):
    status: int
    body: bytes


class Stopped(Exception):
    """The line was given up before its end: it has no result."""


class LineRunner:
    """Thread-safe."""

    def __init__(
        self,
        cluster: Cluster,
        cards: Mapping[str, ModelCard],
        admission: Admission,
        metrics: Metrics,
        clock: Callable[[], float],
        elsewhere: Elsewhere = nowhere,
    ) -> None:
        self._cluster, self._cards, self._admission = cluster, cards, admission
        self._metrics, self._clock, self._elsewhere = metrics, clock, elsewhere

    def parse(self, body: bytes) -> CompletionRequest:
        """Raises InvalidRequest."""
        request = parse_completion(body, "application/json")
        for field in ("stream", "background"):
            if getattr(request, field):
                raise InvalidRequest(
                    f"{field} is not possible in a batch; leave it out", param=field
                )
        return request

    def is_elsewhere(self, request: CompletionRequest) -> bool:
        """Whether the line is for another cluster. Raises Unavailable."""
        models = self._cluster.models()
        name = real_name(models, request.model, self._cards)
        return name not in models and self._elsewhere(name)

    def run(
        self,
        request: CompletionRequest,
        *,
        owner: str,
        request_id: str,
        seed: int,
        stopped: Callable[[], bool],
    ) -> LineAnswer:
        """`seed` is for a request without one. Raises Stopped soon after `stopped` says so."""
        try:
            return LineAnswer(200, self._run(request, owner, request_id, seed, stopped))
        except Stopped:
            raise
        except Exception as error:
            return refused(error)

    def _run(
        self,
        request: CompletionRequest,
        owner: str,
        request_id: str,
        seed: int,
        stopped: Callable[[], bool],
    ) -> bytes:
        if request.seed is None:
            request = msgspec.structs.replace(request, seed=seed)
        caller = Caller.of_owner(self._admission, owner, request_id)
        models = self._cluster.models()
        name = real_name(models, request.model, self._cards)
        info = caller.find_model(models, name, self._cards)
        caller.user = request.user
        tokenizer = self._cluster.tokenizer(info.name)
        plan = behind(
            make_plan(
                request,
                info,
                tokenizer,
                tenant=caller.tenant,
                weight=caller.weight,
                clock=self._clock,
            ),
            BATCH_PRIORITY,
        )
        caller.admit_line(plan)

        def is_over() -> bool:
            caller.check_still_allowed()
            return stopped()

        while True:
            assembler, collected = Assembler(plan, tokenizer), Collected(plan)
            try:
                handle = Gathered(self._cluster.submit(plan.request, is_patient=True), GATHER_S)
                generate(plan, handle, assembler, collected, self._metrics, is_over)
            except Unavailable as error:  # the cluster or its memory is full
                log.debug("a line of a batch waits: %s", error)
                if is_over():
                    raise Stopped from None
                time.sleep(RETRY_S)
            except ClientGone:
                raise Stopped from None
            else:
                return encode(collected.completion(assembler, assembler.best(plan.completion.n)))


def choices(request: CompletionRequest) -> int:
    """That are generated at once."""
    return prompt_count(request) * request.generated


def refused(error: Exception) -> LineAnswer:
    """The answer of a line that ended in an error."""
    known = error if isinstance(error, ApiError) else errors.unexpected(error)
    return LineAnswer(known.status, errors.body(known))
