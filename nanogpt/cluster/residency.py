"""Decides which models are in memory, and which request may run: no sockets, no threads, no clock.

A model goes through these states on all ranks together:

    absent ──► loading ──► open ◄──► draining ──► unloading ──► absent

Requests for an open model run at once; all others wait, in the order of their arrival. One change
is under way at a time, for the model whose request has waited longest. Room is made by those that
were not used for longest: a model that drains takes nothing new, finishes what runs, and goes. One
that was loaded serves all that waited for it, and while it has work stays for as long as loading
took at least: two models which compete for one place spend half of their time on changes at most.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

State = Literal["absent", "loading", "open", "draining", "unloading"]

RETRY_S = 30.0  # a model that could not be loaded is not tried again so soon, but by an operator
MOST_DEATHS = 3  # of groups in a row while they loaded a model: then it is to blame
IDLE_PART = 0.1  # of its loading time: a model that is idle for so long need not stay
BUSY_RETRY_S = 10  # Retry-After of who has waited in vain
GIB = 2**30


class Load(NamedTuple):
    model: str


class Unload(NamedTuple):
    model: str


class Admit(NamedTuple):
    """The request's model is open: it runs from here on."""

    request_id: str


class Refuse(NamedTuple):
    """The request is over. With `retry_after` (seconds) it is worth another attempt."""

    request_id: str
    message: str
    code: str
    retry_after: int = 0


Action = Load | Unload | Admit | Refuse


class ModelStatus(NamedTuple):
    """A model at a glance. `bytes` are of weights and KV on each rank, while it is in memory."""

    name: str
    state: State
    pinned: bool
    bytes: int
    running: int  # requests
    waiting: int
    used_at: float | None  # time.monotonic() of the last request's beginning or end
    load_s: float  # how long it took last time; 0: not known
    loads: int
    failures: int  # to load
    evictions: int  # to make room
    problem: str  # why it could not be loaded, if that was so the last time


class _Waiting(NamedTuple):
    number: int  # of arrival
    deadline: float


class _Model:
    def __init__(self, name: str) -> None:
        self.name = name
        self.need = 0
        self.state: State = "absent"
        self.waiting: dict[str, _Waiting] = {}
        self.running: dict[str, int] = {}  # number of arrival
        self.pinned = False
        self.wanted: int | None = None  # by an operator: number of arrival
        self.leaves = False  # as an operator wants it
        self.used_at: float | None = None
        self.stays_until = 0.0
        self.failed_until = 0.0
        self.problem = ""
        self.deaths = 0
        self.load_s = 0.0
        self.loads = self.failures = self.evictions = 0

    @property
    def is_there(self) -> bool:
        return self.state != "absent"

    def may_go(self, now: float) -> bool:
        """Whether it may be chosen to make room."""
        if self.state != "open" or self.pinned:
            return False
        is_idle = not self.running and now >= (self.used_at or 0.0) + IDLE_PART * self.load_s
        return is_idle or now >= self.stays_until

    def status(self) -> ModelStatus:
        return ModelStatus(
            self.name,
            self.state,
            self.pinned,
            self.need,
            len(self.running),
            len(self.waiting),
            self.used_at,
            self.load_s,
            self.loads,
            self.failures,
            self.evictions,
            self.problem,
        )


class Residency:
    """For one thread; `status` for any. Times are monotonic seconds, given by the caller.

    `turn` says what is to be done. Call it after every change, and now and then while `is_busy`.
    """

    def __init__(self, *, wait_s: float, pinned: Iterable[str] = ()) -> None:
        """`wait_s`: how long a request may wait for its model."""
        self._wait_s = wait_s
        self._pinned = set(pinned)
        self._budget = 0
        self._models: dict[str, _Model] = {}
        self._model_of: dict[str, _Model] = {}  # by request
        self._arrivals = 0
        self._target: _Model | None = None

    def configure(self, needs: Mapping[str, int], budget: int) -> None:
        """The models that there are from now on, and the bytes of each; `budget` 0: no limit.
        Requests for others are forgotten."""
        self._budget = budget
        for name in self._models.keys() - needs.keys():
            model = self._models.pop(name)
            for request_id in (*model.waiting, *model.running):
                del self._model_of[request_id]
        for name, need in needs.items():
            model = self._models.setdefault(name, _Model(name))
            model.need, model.pinned = need, name in self._pinned
        self._target = None

    # Requests

    def arrive(self, request_id: str, model: str, now: float, *, is_patient: bool) -> None:
        """A request waits for its turn; a patient one as long as that takes."""
        known = self._models[model]
        self._arrivals += 1
        deadline = float("inf") if is_patient else now + self._wait_s
        known.waiting[request_id] = _Waiting(self._arrivals, deadline)
        self._model_of[request_id] = known

    def leave(self, request_id: str, now: float) -> None:
        """A request has ended, however. Unknown ones are fine."""
        model = self._model_of.pop(request_id, None)
        if model is None:
            return
        model.waiting.pop(request_id, None)
        if model.running.pop(request_id, None) is not None:
            model.used_at = now

    # What the ranks tell

    def begin(self, held: Mapping[str, bool], now: float) -> None:
        """A group is there, with these models in its memory: on all of its ranks, or (False) on
        some, from where they have to go first."""
        for model in self._models.values():
            model.state = "absent"
        for name, by_all in held.items():
            if name in self._models:
                self._models[name].state = "open" if by_all else "draining"
                self._models[name].leaves = not by_all
                self._models[name].used_at = self._models[name].used_at or now

    def lose(self) -> None:
        """The group is gone: what ran waits for the next one, before all that came later."""
        for model in self._models.values():
            if model.state == "loading":
                model.deaths += 1
            again = {i: _Waiting(n, float("inf")) for i, n in model.running.items()}
            both = again | model.waiting
            model.waiting = dict(sorted(both.items(), key=lambda item: item[1].number))
            model.running, model.state, model.leaves = {}, "absent", False
            model.stays_until = 0.0
        self._target = None

    def loaded(self, name: str, now: float, seconds: float) -> None:
        model = self._models[name]
        model.state, model.wanted, model.problem, model.deaths = "open", None, "", 0
        model.load_s, model.used_at, model.stays_until = seconds, now, now + seconds
        model.loads += 1

    def failed(self, name: str, now: float, problem: str) -> None:
        """It could not be loaded. Some ranks may have it: it goes from all of them."""
        model = self._models[name]
        model.state, model.leaves, model.wanted = "draining", True, None
        self._blame(model, now, problem)

    def unloaded(self, name: str) -> None:
        self._models[name].state, self._models[name].leaves = "absent", False

    # What operators ask. Each returns why it can't be done, or nothing.

    def load(self, name: str) -> str:
        model = self._models[name]
        if problem := self._too_large(model):
            return problem
        model.failed_until = 0.0
        model.deaths = 0
        model.leaves = False
        if model.state == "draining":
            model.state = "open"
        if model.state != "open" and model.wanted is None:
            self._arrivals += 1
            model.wanted = self._arrivals
        return ""

    def unload(self, name: str) -> str:
        model = self._models[name]
        if model.pinned:
            return f"the model {name!r} is pinned: unpin it first"
        model.wanted = None
        model.leaves = model.is_there
        return ""

    def pin(self, name: str) -> str:
        """Have it in memory for good."""
        if problem := self.load(name):
            return problem
        self._pinned.add(name)
        self._models[name].pinned = True
        return ""

    def unpin(self, name: str) -> str:
        self._pinned.discard(name)
        self._models[name].pinned = False
        return ""

    # Decisions

    @property
    def budget(self) -> int:
        """Bytes for all models that are in memory; 0: there is no limit."""
        return self._budget

    @property
    def used(self) -> int:
        """Bytes of the models that are in memory, or on their way in or out."""
        return sum(model.need for model in list(self._models.values()) if model.is_there)

    @property
    def pinned(self) -> list[str]:
        return sorted(self._pinned)

    @property
    def resident(self) -> list[str]:
        """What a new group should begin with."""
        return [m.name for m in self._models.values() if m.state in ("open", "draining")]

    @property
    def is_busy(self) -> bool:
        """Whether time alone may bring a change."""
        return any(
            m.waiting or m.leaves or m.wanted or (m.pinned and not m.is_there)
            for m in self._models.values()
        )

    def status(self) -> list[ModelStatus]:
        return [model.status() for model in list(self._models.values())]

    def turn(self, now: float, only: str | None = None) -> list[Action]:
        """What is to be done now. With `only` all other requests wait until that one is over."""
        actions: list[Action] = []
        for model in self._models.values():
            if model.deaths >= MOST_DEATHS:
                self._blame(model, now, f"the ranks died {model.deaths} times while they loaded it")
                model.wanted, model.deaths = None, 0
            if model.wanted is not None and (problem := self._too_large(model)):
                model.wanted = None  # something was pinned since an operator asked for it
                model.failures += 1
                model.problem = problem
        self._admit(now, only, actions)  # first: who has come must be served before it may go
        self._change(now, only, actions)
        self._admit(now, only, actions)
        self._refuse(now, actions)
        return actions

    def _blame(self, model: _Model, now: float, problem: str) -> None:
        model.failures += 1
        model.problem, model.failed_until = problem, now + RETRY_S

    def _admit(self, now: float, only: str | None, actions: list[Action]) -> None:
        for model in self._models.values():
            if model.state != "open" or model.leaves:
                continue
            for request_id in [i for i in model.waiting if only in (None, i)]:
                model.running[request_id] = model.waiting.pop(request_id).number
                model.used_at = now
                actions.append(Admit(request_id))

    def _refuse(self, now: float, actions: list[Action]) -> None:
        """Those that have waited too long, or wait in vain."""
        for model in self._models.values():
            if not model.waiting or model.state == "open":
                continue
            vain = self._vain(model, now)
            for request_id, waiting in list(model.waiting.items()):
                refusal = vain
                if refusal is None and now >= waiting.deadline:
                    refusal = Refuse(
                        "",
                        f"the model {model.name!r} is not in memory, and there was no room for it "
                        f"within {self._wait_s:g} s; try again later",
                        "model_not_loaded",
                        BUSY_RETRY_S,
                    )
                if refusal is not None:
                    actions.append(refusal._replace(request_id=request_id))
                    self.leave(request_id, now)

    def _vain(self, model: _Model, now: float) -> Refuse | None:
        if now < model.failed_until:
            message = f"the model {model.name!r} could not be loaded; the server's log says why"
            return Refuse("", message, "model_load_failed")
        if too_large := self._too_large(model):
            return Refuse("", too_large, "no_room", BUSY_RETRY_S)
        return None

    def _too_large(self, model: _Model) -> str:
        """Why it can't be in memory whatever goes, if that is so."""
        others = [m for m in self._models.values() if m.pinned and m is not model]
        left = self._budget - sum(m.need for m in others)
        if not self._budget or model.need <= left:
            return ""
        beside = f" beside the pinned {', '.join(m.name for m in others)}" if others else ""
        return (
            f"the model {model.name!r} takes {model.need / GIB:.2f} GiB, and there are "
            f"{max(0, left) / GIB:.2f} GiB for models{beside}"
        )

    def _change(self, now: float, only: str | None, actions: list[Action]) -> None:
        """Begin the next change, or bring the present one further."""
        before, target = self._target, self._choose(now, only)
        self._target = target
        for model in self._models.values():
            if model.leaves and model.state == "open":
                model.state = "draining"
            elif model.state == "draining" and not model.leaves and target is not before:
                model.state = "open"  # it was to make room for another one
        if target is not None and target.state == "absent":
            self._make_room(target, now)
        for model in self._models.values():
            if model.state == "draining" and not model.running:
                model.state = "unloading"
                model.evictions += not model.leaves
                actions.append(Unload(model.name))
        is_changing = any(m.state in ("loading", "unloading") for m in self._models.values())
        if target is None or is_changing or target.state != "absent":
            return
        if self._fits(target.need):
            target.state = "loading"
            actions.append(Load(target.name))

    def _choose(self, now: float, only: str | None) -> _Model | None:
        """The model to load next: the present one while anybody wants it, else the one that was
        asked for first."""
        asked = {}
        for model in self._models.values():
            if model.state == "open" or now < model.failed_until or self._too_large(model):
                continue
            numbers = [w.number for i, w in model.waiting.items() if only in (None, i)][:1]
            numbers += [] if model.wanted is None else [model.wanted]
            numbers += [0] if model.pinned else []
            if numbers:
                asked[model.name] = min(numbers)
        if self._target is not None and self._target.name in asked:
            return self._target
        return self._models[min(asked, key=asked.__getitem__)] if asked else None

    def _fits(self, need: int) -> bool:
        return not self._budget or self.used + need <= self._budget

    def _make_room(self, target: _Model, now: float) -> None:
        """Have models drain, those first that were not used for longest and no more than needed."""
        if self._fits(target.need):
            return
        going = [m for m in self._models.values() if m.state in ("draining", "unloading")]
        lacking = self.used + target.need - self._budget - sum(m.need for m in going)
        victims: list[_Model] = []
        for model in sorted(self._models.values(), key=lambda m: (bool(m.running), m.used_at or 0)):
            if lacking <= sum(m.need for m in victims):
                break
            if model.may_go(now):
                victims.append(model)
        spare = sum(m.need for m in victims) - lacking
        if spare < 0:
            return  # some of them have only just come
        for model in victims:
            if model.need <= spare:
                spare -= model.need
            else:
                model.state = "draining"
