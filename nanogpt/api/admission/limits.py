"""Requests and tokens per minute, by key and by user: taking, settling, and saying what is left."""

import math
import threading
from typing import Literal

from nanogpt.admission_config import Limits
from nanogpt.api.admission.keys import Principal
from nanogpt.api.admission.windows import Claim, Full, Level, Name, Taken, Windows
from nanogpt.errors import InvalidRequest, RateLimited

Kind = Literal["requests", "tokens"]


class Ticket:
    """An admitted request's reservation of tokens: settled once, with what was really used."""

    def __init__(self, windows: Windows, taken: Taken | None, reserved: int) -> None:
        self._windows, self._taken, self.reserved = windows, taken, reserved
        self._lock = threading.Lock()

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Give back what was reserved and not used. Only the first call counts.

        For a request that failed or was cancelled: what was used until then, so maybe (0, 0).
        A ticket that is never settled costs its reservation until that is a minute old.
        """
        with self._lock:
            taken, self._taken = self._taken, None
        if taken is not None:
            unused = self.reserved - max(0, prompt_tokens) - max(0, completion_tokens)
            if unused > 0:
                self._windows.give_back(taken, unused)


class Limiter:
    """Thread-safe."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def take_request(self, principal: Principal, user: str) -> None:
        """Raises RateLimited."""
        claims = _claims("requests", principal, user, 1)
        if claims and isinstance(full := self._windows.take(claims), Full):
            raise self._limited("requests", full, principal, user)

    def reserve_tokens(self, principal: Principal, user: str, cost: int) -> Ticket:
        """Raises RateLimited; InvalidRequest for what could never be admitted."""
        claims = _claims("tokens", principal, user, cost)
        for claim in claims:
            if claim.cost > claim.limit:
                raise InvalidRequest(
                    f"the request needs up to {cost} tokens (prompts, and max_tokens for each "
                    f"choice), over the limit of {claim.limit} per minute for "
                    f"{_whose(claim)}; lower max_tokens or n, or shorten the prompt",
                    param="max_tokens",
                )
        taken = self._windows.take(claims) if claims else None
        if isinstance(taken, Full):
            raise self._limited("tokens", taken, principal, user)
        return Ticket(self._windows, taken, cost)

    def headers(self, principal: Principal, user: str) -> dict[str, str]:
        """x-ratelimit-*: of key and user, whichever has less left. Empty without limits."""
        return {
            name: value
            for kind, level in self.tightest(principal, user).items()
            for name, value in (
                (f"x-ratelimit-limit-{kind}", str(level.limit)),
                (f"x-ratelimit-remaining-{kind}", str(level.remaining)),
                (f"x-ratelimit-reset-{kind}", _duration(level.reset_s)),
            )
        }

    def tightest(self, principal: Principal, user: str) -> dict[Kind, Level]:
        """By kind, the limit with the least left."""
        levels = self.levels(principal, user)
        tightest: dict[Kind, Level] = {}
        for kind in _KINDS:
            of_kind = [level for level in levels if level.name.kind == kind]
            if of_kind:
                tightest[kind] = min(of_kind, key=lambda level: (level.remaining, -level.reset_s))
        return tightest

    def levels(self, principal: Principal, user: str) -> list[Level]:
        claims = [claim for kind in _KINDS for claim in _claims(kind, principal, user, 0)]
        return self._windows.levels(claims) if claims else []

    def _limited(self, kind: Kind, full: Full, principal: Principal, user: str) -> RateLimited:
        claim, seconds = full.claim, max(1, math.ceil(full.wait_s))
        needs = "" if kind == "requests" else f" and this request needs up to {claim.cost}"
        return RateLimited(
            f"{_whose(claim)} may use {claim.limit} {kind} per minute{needs}; "
            f"try again in {seconds} s",
            code=kind,
            headers={"Retry-After": str(seconds), **self.headers(principal, user)},
        )


_KINDS: tuple[Kind, ...] = ("requests", "tokens")


def _claims(kind: Kind, principal: Principal, user: str, cost: int) -> list[Claim]:
    if principal.admin:
        return []
    claims = []
    of_key = _limit(principal.limits, kind)
    if of_key:
        claims.append(Claim(Name(kind, principal.key_name, ""), of_key, cost))
    of_user = _limit(principal.user_limits, kind)
    if of_user and user:
        claims.append(Claim(Name(kind, principal.key_name, user), of_user, cost))
    return claims


def _limit(limits: Limits, kind: Kind) -> int:
    return limits.requests_per_minute if kind == "requests" else limits.tokens_per_minute


def _whose(claim: Claim) -> str:
    return "this user" if claim.name.user else "this API key"


def _duration(seconds: float) -> str:
    """As OpenAI's headers write it: "1m0s", "17s"; rounded up to whole seconds."""
    minutes, rest = divmod(max(0, math.ceil(seconds)), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
