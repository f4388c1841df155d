"""Who is shut out at present, as a look-up that a request can afford."""

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from nanogpt.api.admission.clock import utc
from nanogpt.api.admission.subject import Subject
from nanogpt.errors import ApiError, Banned, InvalidRequest, RateLimited

Kind = Literal["ban", "cooldown"]
MAX_REASON_CHARS = 200
MAX_BAN_S = 100 * 365 * 86_400.0  # longer is for good


class Ban(msgspec.Struct, frozen=True):
    """Shuts a subject out: a ban with 403, a cool-down (a rule's, and short) with 429.

    User "" is the key itself; key "" is whichever key.
    """

    key: str
    user: str
    kind: Kind
    reason: str
    by: str
    created: float  # seconds since the epoch
    until: float | None  # None: for ever

    @property
    def subject(self) -> Subject:
        return Subject(self.key, self.user)

    def holds(self, now: float) -> bool:
        return self.until is None or now < self.until

    def error(self, now: float) -> ApiError:
        """The answer to whoever it shuts out."""
        whom = "this user" if self.user else "this API key"
        if self.kind == "cooldown" and self.until is not None:
            seconds = max(1, math.ceil(self.until - now))
            return RateLimited(
                f"{whom} has to pause ({self.reason}); try again in {seconds} s",
                code="requests",
                headers={"Retry-After": str(seconds)},
            )
        until = "for good" if self.until is None else f"until {utc(self.until)}"
        return Banned(
            f"{whom} is banned {until}: {self.reason}; ask the operator of this server to lift it",
            headers={"x-should-retry": "false"},
        )

    def __str__(self) -> str:
        word = "banned" if self.kind == "ban" else "cooling down"
        until = "for good" if self.until is None else f"until {utc(self.until)}"
        return f"{self.subject} is {word} {until}, since {utc(self.created)}, by {self.by}"


def new_ban(subject: Subject, reason: str, by: str, now: float, seconds: float | None) -> Ban:
    """An operator's ban; `seconds` None: for good. Raises InvalidRequest."""
    if subject == Subject("", ""):
        raise InvalidRequest("name a user or a key to ban", param="user")
    reason = reason.strip()
    if not reason or len(reason) > MAX_REASON_CHARS or not reason.isprintable():
        raise InvalidRequest(
            f"give a reason of 1 to {MAX_REASON_CHARS} printable characters; the banned see it",
            param="reason",
        )
    if seconds is not None and not 0 < seconds <= MAX_BAN_S:
        raise InvalidRequest(
            "a ban lasts more than 0 seconds and at most 100 years; "
            "for a ban for good leave the duration out",
            param="seconds",
        )
    until = None if seconds is None else now + seconds
    return Ban(*subject, "ban", reason, by, now, until)


def worst(bans: Iterable[Ban], now: float) -> Ban | None:
    """Of those in force a ban before a cool-down, and the longest."""
    return min((ban for ban in bans if ban.holds(now)), key=_severity, default=None)


def _severity(ban: Ban) -> tuple[bool, float]:
    return ban.kind == "cooldown", -(ban.until if ban.until is not None else math.inf)


class BanList:
    """The bans of one moment. Never changed: a new list replaces it."""

    def __init__(self, bans: Iterable[Ban]) -> None:
        self._by_subject: dict[Subject, list[Ban]] = {}
        for ban in bans:
            self._by_subject.setdefault(ban.subject, []).append(ban)

    def find(self, key: str, user: str, now: float) -> Ban | None:
        """What shuts this user of this key out. Three look-ups, whatever the number of bans."""
        subjects = [Subject(key, "")]
        if user:
            subjects += [Subject("", user), Subject(key, user)]
        return worst((ban for s in subjects for ban in self._by_subject.get(s, ())), now)
