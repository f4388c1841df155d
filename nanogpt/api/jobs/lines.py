"""One line of a batch: the same way as a request, behind everybody else's."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from nanogpt.api import errors
from nanogpt.api.admission import Admission
from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Cluster, LiveHandle
from nanogpt.api.caller import Caller
from nanogpt.api.catalogue import system_fingerprint
from nanogpt.api.exchange import Exchange
from nanogpt.api.jobs.completions import BATCH_PRIORITY, behind
from nanogpt.api.jobs.owned import check_still_allowed
from nanogpt.api.jobs.unattended import unattended
from nanogpt.api.jobs.whereabouts import Elsewhere, nowhere
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import Plan, real_name
from nanogpt.api.protocol import CompletionRequest, parse_completion, prompt_count
from nanogpt.api.response import Collected, encode
from nanogpt.errors import ApiError, InvalidRequest, Unavailable
from nanogpt.registry import ModelCard
from nanogpt.request import EngineEvent, TokenEvent

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

    def line(
        self,
        request: CompletionRequest,
        *,
        owner: str,
        request_id: str,
        seed: int,
        on_news: Callable[[], None],
    ) -> "Line":
        """`seed` is for a request without one; `on_news` is called, in any thread, when the line
        should be advanced at once."""
        if request.seed is None:
            request = msgspec.structs.replace(request, seed=seed)
        return Line(self, request, owner, request_id, on_news)

    def check_still_allowed(self, owner: str, user: str | None, request_id: str) -> None:
        """Every now and then while lines run. Raises Banned."""
        check_still_allowed(self._admission, owner, user, request_id)

    def is_current(self, plan: Plan) -> bool:
        """Whether it is for the model as it is now."""
        info = self._cluster.models().get(plan.request.model)
        return info is not None and system_fingerprint(info) == plan.fingerprint

    def plan(
        self, request: CompletionRequest, owner: str, request_id: str, *, is_admitted: bool
    ) -> Plan:
        """Raises ApiError. Whether the line may be generated at all is asked only once."""
        caller = Caller.of_owner(self._admission, owner, request_id)
        caller.user = request.user
        models = self._cluster.models()
        name = real_name(models, request.model, self._cards)
        info = caller.find_model(models, name, self._cards)
        plan = caller.plan(request, info, self._cluster.tokenizer(info.name), self._clock)
        if not is_admitted:
            caller.admit_line(plan)
        return behind(plan, BATCH_PRIORITY, STOP_S if request.stops else GATHER_S)

    def submit(self, plan: Plan, on_news: Callable[[], None]) -> "Attempt":
        """Raises Unavailable."""
        assembler = Assembler(plan, self._cluster.tokenizer(plan.request.model))
        handle = self._cluster.submit(plan.request, is_patient=True, may_block=False)
        exchange = unattended(plan, handle, assembler, self._metrics, lambda: False)
        return Attempt(exchange, handle, on_news)


class Line:
    """One line on its way. For one thread."""

    def __init__(
        self,
        runner: LineRunner,
        request: CompletionRequest,
        owner: str,
        request_id: str,
        on_news: Callable[[], None],
    ) -> None:
        self.request = request
        self._runner, self._owner, self._id = runner, owner, request_id
        self._on_news = on_news
        self._plan: Plan | None = None
        self._attempt: Attempt | None = None

    @property
    def is_begun(self) -> bool:
        """Whether the engines have it."""
        return self._attempt is not None

    @property
    def has_tokens(self) -> bool:
        """Whether anything of it was generated."""
        return self._attempt is not None and self._attempt.has_tokens

    def begin(self) -> LineAnswer | None:
        """Give it to the engines; the answer, when that can't be done. Raises Unavailable."""
        try:
            if self._plan is None or not self._runner.is_current(self._plan):
                is_admitted = self._plan is not None
                self._plan = self._runner.plan(
                    self.request, self._owner, self._id, is_admitted=is_admitted
                )
            self._attempt = self._runner.submit(self._plan, self._on_news)
            return None
        except Unavailable:
            raise
        except Exception as error:
            return refused(error)

    def advance(self) -> LineAnswer | None:
        """Take what is new; the answer, when that was the end. Cheap when there is nothing. Raises
        Unavailable when the engines can't have it now: it has not begun then."""
        if self._attempt is None:
            return None
        try:
            body = self._attempt.advance()
        except Unavailable:
            self.close()
            raise
        except Exception as error:
            self.close()
            return refused(error)
        return None if body is None else LineAnswer(200, body)

    def close(self) -> None:
        """Give up what runs."""
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None


class Attempt:
    """A request of a line at the engines."""

    def __init__(self, exchange: Exchange, handle: LiveHandle, on_news: Callable[[], None]) -> None:
        self._exchange, self._on_news = exchange, on_news
        self._collected = Collected(exchange.plan)
        self._inbox: deque[EngineEvent] = deque()
        self.has_tokens = False
        handle.send_to(self._take)

    def _take(self, events: Sequence[EngineEvent]) -> None:
        """In whatever thread brings them."""
        self._inbox.extend(events)
        if any(map(_is_urgent, events)):
            self._on_news()

    def advance(self) -> bytes | None:
        """The answer, when it is complete. Raises ServerError, Unavailable."""
        if self._inbox:
            events = [self._inbox.popleft() for _ in range(len(self._inbox))]
            self._collected.add(self._exchange.advance(events))
            self.has_tokens = True
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
