"""One line of a batch: the same way as a request, behind everybody else's."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from nanogpt.api import errors
from nanogpt.api.admission import Admission
from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Cluster, LiveHandle
from nanogpt.api.caller import Caller
from nanogpt.api.exchange import Exchange
from nanogpt.api.jobs.completions import BATCH_PRIORITY, behind
from nanogpt.api.jobs.owned import check_still_allowed
from nanogpt.api.jobs.unattended import unattended
from nanogpt.api.jobs.whereabouts import Elsewhere, nowhere
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import make_plan, real_name
from nanogpt.api.protocol import CompletionRequest, parse_completion, prompt_count
from nanogpt.api.response import Collected, encode
from nanogpt.errors import ApiError, InvalidRequest, Unavailable
from nanogpt.registry import ModelCard
from nanogpt.request import EngineEvent, TokenEvent

log = logging.getLogger(__name__)

RETRY_S = 0.5  # after a cluster that was full, or had no room for the model
# How long tokens may be on their way to here. That of a line's end is told at once; what a stop
# string ends, only when it is seen.
GATHER_S = 2.0
STOP_S = 0.25


class LineAnswer(NamedTuple):
    status: int
    body: bytes


class LineRunner:
    """Makes lines of requests. Thread-safe."""

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

    def begin(
        self,
        request: CompletionRequest,
        *,
        owner: str,
        request_id: str,
        seed: int,
        on_news: Callable[[], None],
    ) -> "Line":
        """`seed` is for a request without one; `on_news` is called, in any thread, when the line
        should be looked at again at once."""
        if request.seed is None:
            request = msgspec.structs.replace(request, seed=seed)
        caller = Caller.of_owner(self._admission, owner, request_id)
        caller.user = request.user
        return Line(request.user, lambda: self._attempt(request, caller, on_news))

    def check_still_allowed(self, owner: str, user: str | None, request_id: str) -> None:
        """Every now and then while lines run. Raises Banned."""
        check_still_allowed(self._admission, owner, user, request_id)

    def _attempt(
        self, request: CompletionRequest, caller: Caller, on_news: Callable[[], None]
    ) -> "_Attempt":
        """Raises ApiError."""
        models = self._cluster.models()
        name = real_name(models, request.model, self._cards)
        info = caller.find_model(models, name, self._cards)
        tokenizer = self._cluster.tokenizer(info.name)
        plan = make_plan(
            request,
            info,
            tokenizer,
            tenant=caller.tenant,
            weight=caller.weight,
            clock=self._clock,
        )
        plan = behind(plan, BATCH_PRIORITY, STOP_S if request.stops else GATHER_S)
        caller.admit_line(plan)
        handle = self._cluster.submit(plan.request, is_patient=True, may_block=False)
        assembler = Assembler(plan, tokenizer)
        exchange = unattended(plan, handle, assembler, self._metrics, lambda: False)
        return _Attempt(exchange, handle, on_news)


class Line:
    """One line on its way. For one thread."""

    def __init__(self, user: str | None, attempt: Callable[[], "_Attempt"]) -> None:
        self.user = user
        self._make_attempt = attempt
        self._attempt: _Attempt | None = None
        self._try_at = 0.0  # time.monotonic()

    def turn(self) -> LineAnswer | None:
        """Go on; the answer, when that was the end. Cheap when there is nothing new."""
        try:
            if self._attempt is None:
                if time.monotonic() < self._try_at:
                    return None
                self._attempt = self._make_attempt()
            body = self._attempt.turn()
            return None if body is None else LineAnswer(200, body)
        except Unavailable as error:  # the cluster or its memory is full
            log.debug("a line of a batch waits: %s", error)
            self.close()
            self._try_at = time.monotonic() + RETRY_S
            return None
        except Exception as error:
            self.close()
            return refused(error)

    def close(self) -> None:
        """Give up what runs."""
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None


class _Attempt:
    """A request of a line at the engines."""

    def __init__(self, exchange: Exchange, handle: LiveHandle, on_news: Callable[[], None]) -> None:
        self._exchange, self._on_news = exchange, on_news
        self._collected = Collected(exchange.plan)
        self._inbox: deque[EngineEvent] = deque()
        handle.send_to(self._take)

    def _take(self, events: Sequence[EngineEvent]) -> None:
        """In whatever thread brings them."""
        self._inbox.extend(events)
        if any(map(_is_urgent, events)):
            self._on_news()

    def turn(self) -> bytes | None:
        """The answer, when it is complete. Raises ServerError, Unavailable."""
        if self._inbox:
            events = [self._inbox.popleft() for _ in range(len(self._inbox))]
            self._collected.add(self._exchange.advance(events))
        if not self._exchange.assembler.done:
            return None
        self.close()
        assembler = self._exchange.assembler
        n = self._exchange.plan.completion.n
        return encode(self._collected.completion(assembler, assembler.best(n)))

    def close(self) -> None:
        self._exchange.close()


def _is_urgent(event: EngineEvent) -> bool:
    return not isinstance(event, TokenEvent) or event.finish_reason is not None


def choices(request: CompletionRequest) -> int:
    """That are generated at once."""
    return prompt_count(request) * request.generated


def refused(error: Exception) -> LineAnswer:
    """The answer of a line that ended in an error."""
    known = error if isinstance(error, ApiError) else errors.unexpected(error)
    return LineAnswer(known.status, errors.body(known))
