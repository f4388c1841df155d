"""Why a user is blocked: everything that is known about it, in one answer."""

import msgspec

from nanogpt.admission_config import AdmissionConfig
from nanogpt.api.admission.audit import Entry, last_entries
from nanogpt.api.admission.bans import Ban, worst
from nanogpt.api.admission.rules import MEMORY_S
from nanogpt.api.admission.state import Action, State

MAX_DECISIONS = 20


class Strike(msgspec.Struct, frozen=True):
    """Strikes that still count towards a rule's number. User "": of the whole key."""

    key: str
    user: str
    rule: str
    times: list[float]  # seconds since the epoch


class LimitState(msgspec.Struct, frozen=True):
    """A limit of which something is used. User "": the key's."""

    key: str
    user: str
    kind: str  # requests, tokens
    limit: int  # per minute
    used: int
    reset_s: float  # until all of it is there again


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """About a user, under one key or (None) any."""

    user: str
    key: str | None
    blocked: str  # one sentence, or empty when nothing shuts it out
    bans: list[Ban]
    actions: list[Action]  # what rules did in the last day, oldest first
    decisions: list[Entry]  # newest first, from the audit log
    strikes: list[Strike] = []
    limits: list[LimitState] = []


def explain(
    state: State, config: AdmissionConfig, now: float, user: str, key: str | None
) -> Explanation:
    """What the files tell; strikes and limits are known only to the server itself."""
    bans = [ban for ban in state.bans(now) if _concerns(ban, user, key)]
    main = worst(bans, now)
    audit = config.audit_path
    return Explanation(
        user=user,
        key=key,
        blocked=f"{main}: {main.reason}" if main else "",
        bans=bans,
        actions=state.actions(now - MEMORY_S, user, key),
        decisions=last_entries(audit, user, key, MAX_DECISIONS) if audit else [],
    )


def _concerns(ban: Ban, user: str, key: str | None) -> bool:
    if ban.user == user:
        return ban.key == "" or key in (None, ban.key)
    return ban.user == "" and ban.key == key
