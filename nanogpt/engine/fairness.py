"""Who has received how much, and who may take whose place: tokens shared between tenants.

Virtual token counters after Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024),
section 4: a flow's `service` grows by each token done for it, divided by its weight, and the least
served is admitted first. A flow that becomes active is lifted to the least served active one, so
that idling earns no credit; one that leaves with more than the others finds that again when it
comes back. A flow is a tenant within a priority: between priorities there is no fairness to keep,
and one that waits for ever behind a lower value must not hold the others' minimum down.

What counts: each token of a prompt that is computed once for all its choices, whatever the prefix
cache provides is free; each sampled token. Nothing is charged again when a preempted sequence is
recomputed. So a flow's place in the order changes only when a request comes closer to its end.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanogpt.engine.sequence import Sequence

TURN_TOKENS = 256  # a lead that costs a place: against it stands one sequence's recomputation
MAX_IDLE_FLOWS = 1024  # remembered in each priority, so that names can't fill the memory


class Flow:
    """A tenant's sequences of one priority. Compared by identity."""

    __slots__ = ("num_live", "priority", "service", "tenant", "weight")

    def __init__(self, tenant: str, priority: int) -> None:
        self.tenant, self.priority = tenant, priority
        self.weight = 1.0  # as of the latest request
        self.service = 0.0  # tokens / weight
        self.num_live = 0

    def charge(self, num_tokens: int) -> None:
        self.service += num_tokens / self.weight

    def may_displace(self, other: Flow, num_own: int, num_others: int) -> bool:
        """Whether a waiting sequence of this flow deserves the place of a running one of `other`.
        The two have `num_own` and `num_others` running.

        In one priority there are two reasons: it still has no more places for its weight
        afterwards, and has not received more; or it has no more places and is a turn behind,
        which is how flows share fewer places than there are flows. Taking a place for either
        reason removes the reason, and gives the other side neither: nothing swings to and fro.
        """
        if self.priority != other.priority:
            return self.priority < other.priority
        if self is other:
            return False
        if (num_own + 1) / self.weight <= (num_others - 1) / other.weight:
            return self.service <= other.service
        is_behind = self.service + TURN_TOKENS / self.weight <= other.service
        return is_behind and num_own / self.weight <= num_others / other.weight


class _PriorityClass:
    """Flows of one priority, by tenant: those with sequences, and those that left last."""

    def __init__(self) -> None:
        self.active: dict[str, Flow] = {}
        self.idle: OrderedDict[str, Flow] = OrderedDict()


class Flows:
    """Every active flow, and as many idle ones as may matter."""

    def __init__(self) -> None:
        self._classes: dict[int, _PriorityClass] = {}

    def join(self, seq: Sequence) -> None:
        """Count a sequence and its followers to its tenant's flow."""
        peers = self._classes.setdefault(seq.priority, _PriorityClass())
        flow = peers.active.get(seq.tenant)
        if flow is None:
            flow = peers.idle.pop(seq.tenant, None) or Flow(seq.tenant, seq.priority)
            least = min((other.service for other in peers.active.values()), default=0.0)
            flow.service = max(flow.service, least)
            peers.active[seq.tenant] = flow
        flow.weight = seq.weight
        for each in (seq, *seq.followers):
            each.flow = flow
            flow.num_live += 1

    def leave(self, seq: Sequence) -> None:
        """One sequence less. When nobody is left in its priority, all begin anew."""
        flow = seq.flow
        flow.num_live -= 1
        if flow.num_live:
            return
        peers = self._classes[flow.priority]
        del peers.active[flow.tenant]
        if not peers.active:
            del self._classes[flow.priority]
            return
        peers.idle[flow.tenant] = flow
        if len(peers.idle) > MAX_IDLE_FLOWS:
            peers.idle.popitem(last=False)
