"""Who may use the endpoint: the one object that the HTTP layer asks.

The order is from cheap to dear, so that whoever is shut out costs almost nothing:

    authenticate   a digest and a look-up; bans of the key         before the body is read
    precheck       bans of the user, bursts, the request limits    before tokenising
    admit          the token limits, then blocked content          after tokenising
    Ticket.settle  gives back tokens that were not used            at the end, however it ends
    refused        notices an answer of 4xx, whoever refused       in the error handler
"""

import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, NoReturn

import msgspec

from nanogpt.admission_config import ANONYMOUS, AdmissionConfig
from nanogpt.api.admission import keys, redis_windows
from nanogpt.api.admission.audit import Entry, open_audit
from nanogpt.api.admission.bans import Ban, new_ban
from nanogpt.api.admission.clock import Clock
from nanogpt.api.admission.content import Content
from nanogpt.api.admission.explain import Explanation, LimitState, Strike, explain
from nanogpt.api.admission.keys import KeyRing, Principal
from nanogpt.api.admission.limits import Limiter, Ticket
from nanogpt.api.admission.live import Live
from nanogpt.api.admission.record import Recorder
from nanogpt.api.admission.rules import Enforcer
from nanogpt.api.admission.shared_bans import SharedBans
from nanogpt.api.admission.shared_state import SharedState
from nanogpt.api.admission.state import State
from nanogpt.api.admission.subject import Subject, clean_user
from nanogpt.api.admission.windows import WINDOW_S, Claim, Full, MemoryWindows, Name
from nanogpt.errors import (
    ApiError,
    Banned,
    InvalidRequest,
    NotFound,
    RateLimited,
    ServerError,
    StartupError,
    Unauthorized,
)

log = logging.getLogger("admission")

CONTENT_BLOCKED = "content_blocked"
MAX_STRIKES = 1000  # in one answer


@contextmanager
def _told_to_operator() -> Iterator[None]:
    """Raises ServerError for a state file that can't be changed or read."""
    try:
        yield
    except (sqlite3.Error, StartupError) as error:
        log.error("can't use the state file: %s", error)
        raise ServerError(
            f"the server's state file can't be used ({error}); make room or mend it, and try again"
        ) from error


class AdmissionStats(msgspec.Struct, frozen=True):
    """Counters since the start, for the metrics."""

    decisions: dict[tuple[str, str], int]  # by decision and error code (or rule)
    pattern_timeouts: int
    redis_failures: int
    audit_failures: int


class _Caller(NamedTuple):
    principal: Principal
    user: str
    request_id: str
    model: str = ""

    @property
    def subject(self) -> Subject | None:
        """Whom strikes count against: nobody when that could be anybody, or the operator."""
        anybody = self.principal.key_name == ANONYMOUS and not self.user
        if anybody or self.principal.admin:
            return None
        return Subject(self.principal.key_name, self.user)


class Admission:
    """Thread-safe. Raises StartupError when keys, rules or files can't be used.

    `environ` may hold NANOGPT_API_KEYS and NANOGPT_ADMIN_KEY. An admin key is never banned,
    limited or judged by rules. Servers that share a Redis share limits and bans if their `queue`
    has the same name.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        environ: Mapping[str, str],
        clock: Clock = time,
        *,
        queue: str = "nanogpt",
    ) -> None:
        self._config, self._clock = config, clock
        static = keys.configured(config, environ)
        self._content = Content(config.content, clock)
        # One window for requests and one for tokens of each user.
        local = MemoryWindows(clock, WINDOW_S, 2 * config.max_users)
        self._shared = redis_windows.make_shared(config, queue, local, clock)
        self._limiter = Limiter(self._shared or local)
        self._bursts = MemoryWindows(clock, config.bursts.seconds, config.max_users)
        with ExitStack() as resources:
            if self._shared is not None:
                resources.callback(self._shared.close)
            self._state = _open_state(config, queue)
            resources.callback(self._state.close)
            audit = open_audit(config)
            if audit is not None:
                resources.callback(audit.close)
            self._live = Live(
                self._state, lambda stored: KeyRing(config, [*static, *stored]), clock
            )
            self._resources = resources.pop_all()
        self._recorder = Recorder(audit, clock)
        self._enforcer = Enforcer(
            {"refusals": config.refusals, "bursts": config.bursts, "content": config.content},
            self._state,
            clock,
            max_subjects=config.max_users,
            dry_run=config.dry_run,
            changed=self._live.reload,
        )

    def close(self) -> None:
        self._resources.close()

    @property
    def is_open(self) -> bool:
        """Whether everybody may come, since no keys are configured."""
        return not self._live.ring.closed

    # The way of a request

    def authenticate(
        self, authorization: str | None, *, admin: bool = False, request_id: str = ""
    ) -> Principal:
        """Whose key is in the Authorization header. Raises Unauthorized, Banned, RateLimited.

        Without keys everybody is Principal "anonymous"; but `admin` always needs an admin key.
        """
        try:
            principal = self._live.ring.find(authorization, admin=admin)
        except Unauthorized as error:
            self._note_refusal(Entry(request_id=request_id), error)
            raise
        self._check_bans(_Caller(principal, "", request_id))
        return principal

    def named(self, key_name: str) -> Principal:
        """Who left work under this key to be done later. Raises Unauthorized when it is gone."""
        principal = self._live.ring.named(key_name)
        if principal is None:
            raise Unauthorized(f"the API key {key_name!r} that asked for this is no longer valid")
        return principal

    def check_bans(self, principal: Principal, *, user: str | None, request_id: str) -> None:
        """Raises Banned, RateLimited (a cool-down), and InvalidRequest as `precheck` does."""
        self._check_bans(_Caller(principal, clean_user(user), request_id))

    def check_running(self, principal: Principal, *, user: str | None, request_id: str) -> None:
        """Every now and then while a request runs: raises Banned when it was shut out meanwhile.
        A cool-down is for what comes next.
        """
        caller = _Caller(principal, clean_user(user), request_id)
        ban = self._ban_of(caller)
        if ban is not None and ban.kind == "ban":
            self._turn_away(caller, ban)

    def precheck(
        self, principal: Principal, *, user: str | None, request_id: str, model: str
    ) -> None:
        """What needs no tokens, once for a request. Raises Banned, RateLimited, and InvalidRequest
        for a `user` that is too long.
        """
        caller = _Caller(principal, clean_user(user), request_id, model)
        self._check_bans(caller)
        self._notice_burst(caller)
        self._take_request(caller)

    def count_request(self, principal: Principal, *, request_id: str, model: str) -> None:
        """For tokenising: a request of the key like any other, but many at once are no burst, since
        that is how evaluation harnesses go about it. Raises RateLimited.
        """
        self._take_request(_Caller(principal, "", request_id, model))

    def admit(
        self,
        principal: Principal,
        *,
        user: str | None,
        request_id: str,
        model: str,
        prompts: Sequence[str],
        prompt_tokens: int,
        max_new_tokens: int,
    ) -> Ticket:
        """Reserve the tokens: of all prompts, and the most that all choices together may become.

        `prompts` are texts, also where the client sent ids. Raises RateLimited, or InvalidRequest
        for blocked content and for a request that is larger than the limit of a minute.
        """
        caller = _Caller(principal, clean_user(user), request_id, model)
        cost = prompt_tokens + max_new_tokens
        try:
            ticket = self._limiter.reserve_tokens(principal, caller.user, cost)
        except RateLimited as error:
            self._note_refusal(self._entry(caller, prompt_tokens=prompt_tokens), error)
            raise
        try:
            self._check_content(caller, prompts)
        except BaseException:
            ticket.settle(0, 0)
            raise
        left = {k: v.remaining for k, v in self._limiter.tightest(principal, caller.user).items()}
        entry = self._entry(
            caller,
            decision="admitted",
            prompt_tokens=prompt_tokens,
            remaining_requests=left.get("requests"),
            remaining_tokens=left.get("tokens"),
        )
        self._recorder.note(entry)
        return ticket

    def admit_line(
        self,
        principal: Principal,
        *,
        user: str | None,
        request_id: str,
        model: str,
        prompts: Sequence[str],
        prompt_tokens: int,
    ) -> None:
        """A line of a batch, which no limit applies to. Raises Banned, or InvalidRequest for
        blocked content and for a `user` that is too long.
        """
        caller = _Caller(principal, clean_user(user), request_id, model)
        self._check_bans(caller)
        self._check_content(caller, prompts)
        self._recorder.note(self._entry(caller, decision="admitted", prompt_tokens=prompt_tokens))

    def refused(
        self, principal: Principal, *, user: str | None, request_id: str, error: ApiError
    ) -> None:
        """Notice an error answer to an authenticated client. Call it for every one: those that
        aren't the client's mistake, or that a rule of its own counts, are left out here.
        """
        judged = isinstance(error, (Unauthorized, Banned, RateLimited))
        if judged or error.code == CONTENT_BLOCKED or error.status >= 500:
            return
        try:
            caller = _Caller(principal, clean_user(user), request_id)
        except InvalidRequest:  # too long: that is what was refused
            caller = _Caller(principal, "", request_id)
        self._note_refusal(self._entry(caller, rule="refusals"), error)
        self._strike(caller, "refusals")

    def headers(self, principal: Principal, user: str | None) -> dict[str, str]:
        """x-ratelimit-* for any answer to this client; empty when nothing is limited."""
        try:
            return self._limiter.headers(principal, clean_user(user))
        except InvalidRequest:
            return self._limiter.headers(principal, "")

    # What operators do

    def ban(
        self, *, user: str = "", key: str = "", reason: str, seconds: float | None, by: str
    ) -> Ban:
        """Shut out a user (of one key, or "" of any) or, without user, a key. `seconds` None: for
        good. Replaces an earlier ban. Raises InvalidRequest, and NotFound for an unknown key.
        """
        principal = self._live.ring.named(key) if key else None
        if key and principal is None:
            raise NotFound(f"there is no key {key[:100]!r}", param="key")
        if principal is not None and principal.admin:
            raise InvalidRequest("an admin key can't be banned; revoke it", param="key")
        ban = new_ban(Subject(key, clean_user(user)), reason, by, self._clock.time(), seconds)
        with _told_to_operator():
            self._state.put_ban(ban, replace=True)
            self._live.reload()
        self._recorder.note(Entry(decision="ban", key=key, user=ban.user, reason=ban.reason, by=by))
        return ban

    def unban(self, *, user: str = "", key: str = "", by: str) -> list[Ban]:
        """Lift bans and cool-downs, and forget strikes; returns what was in force.

        A user with key "" is meant under every key. Raises InvalidRequest.
        """
        subject = Subject(key, clean_user(user))
        if subject == Subject("", ""):
            raise InvalidRequest("name a user or a key", param="user")
        with _told_to_operator():
            lifted = self._state.lift(subject, self._clock.time())
            self._enforcer.forget(subject)
            self._live.reload()
        for ban in lifted:
            self._recorder.note(Entry(decision="unban", key=ban.key, user=ban.user, by=by))
        return lifted

    def bans(self) -> list[Ban]:
        """Bans and cool-downs in force, oldest first."""
        with _told_to_operator():
            return self._state.bans(self._clock.time())

    def explain(self, user: str, key: str | None = None) -> Explanation:
        """Why a user is blocked, under one key or (None) any; user "" is the key itself."""
        user = clean_user(user)
        with _told_to_operator():
            known = explain(self._state, self._config, self._clock.time(), user, key)
        principals = [p for p in self._live.ring.principals() if key in (None, p.key_name)]
        limits = [
            LimitState(*level.name[1:], level.name.kind, level.limit, level.used, level.reset_s)
            for principal in principals
            for level in self._limiter.levels(principal, user)
            if level.used and level.name.user == user
        ]
        return msgspec.structs.replace(known, strikes=self.strikes(user, key), limits=limits)

    def strikes(self, user: str | None = None, key: str | None = None) -> list[Strike]:
        """Those that count, of one user and key, or of any (None); whoever was struck last comes
        first, and no more than `MAX_STRIKES`.
        """
        counted = reversed(self._enforcer.strikes_of(user, key))
        return [Strike(*subject, rule, times) for subject, rule, times in counted][:MAX_STRIKES]

    def stats(self) -> AdmissionStats:
        audit = self._recorder.audit
        return AdmissionStats(
            decisions=self._recorder.counts(),
            pattern_timeouts=self._content.timeouts,
            redis_failures=self._shared.failures if self._shared is not None else 0,
            audit_failures=audit.failures if audit is not None else 0,
        )

    # Checks

    def _check_bans(self, caller: _Caller) -> None:
        ban = self._ban_of(caller)
        if ban is not None:
            self._turn_away(caller, ban)

    def _ban_of(self, caller: _Caller) -> Ban | None:
        if caller.principal.admin:
            return None
        return self._live.bans.find(caller.principal.key_name, caller.user, self._clock.time())

    def _turn_away(self, caller: _Caller, ban: Ban) -> NoReturn:
        error = ban.error(self._clock.time())
        self._note_refusal(self._entry(caller, reason=ban.reason), error)
        raise error

    def _take_request(self, caller: _Caller) -> None:
        try:
            self._limiter.take_request(caller.principal, caller.user)
        except RateLimited as error:
            self._note_refusal(self._entry(caller), error)
            raise

    def _notice_burst(self, caller: _Caller) -> None:
        subject, rule = caller.subject, self._config.bursts
        if subject is None or not rule.strikes:
            return
        name = Name("bursts", *subject)
        if isinstance(self._bursts.take([Claim(name, rule.requests, 1)]), Full):
            self._bursts.clear(name)
            self._strike(caller, "bursts")
            self._check_bans(caller)

    def _check_content(self, caller: _Caller, prompts: Sequence[str]) -> None:
        if caller.principal.admin or not self._content:
            return
        finding, given_up = self._content.find(prompts)
        for name in given_up:
            entry = self._entry(
                caller, decision="gave_up", rule="content", reason=f"pattern {name}"
            )
            self._recorder.note(entry)
        if finding is None:
            return
        error = InvalidRequest(
            "the prompt is refused by a content rule of this server; change it, or ask the "
            "operator if you think that this is a mistake",
            param="prompt",
            code=CONTENT_BLOCKED,
        )
        reason = f"{finding.kind} {finding.name}"
        dry_run = self._config.dry_run
        entry = self._entry(caller, rule="content", reason=reason, dry_run=dry_run)
        self._note_refusal(entry, error)
        self._strike(caller, "content")
        if not dry_run:
            raise error

    def _strike(self, caller: _Caller, rule: str) -> None:
        if caller.subject is not None:
            for action in self._enforcer.strike(caller.subject, rule):
                self._recorder.note_action(action, caller.request_id)

    def _entry(self, caller: _Caller, **fields: object) -> Entry:
        known = {
            "request_id": caller.request_id,
            "key": caller.principal.key_name,
            "user": caller.user,
            "model": caller.model,
        }
        return msgspec.convert({**known, **fields}, Entry)

    def _note_refusal(self, entry: Entry, error: ApiError) -> None:
        refusal = msgspec.structs.replace(
            entry, decision="refused", code=error.code or str(error.status)
        )
        self._recorder.note(refusal)


def _open_state(config: AdmissionConfig, queue: str) -> State:
    if config.redis_url:
        client = redis_windows.connect(config.redis_url)
        return SharedState(config.state_path, SharedBans(client, queue))
    state = State(config.state_path)
    state.own()
    return state
