"""From strikes to cool-downs to bans: what a server does by itself about repeated abuse."""

import contextlib
import logging
import sqlite3
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

from nanogpt.admission_config import ANONYMOUS, Rule
from nanogpt.api.admission.bans import Ban, Kind
from nanogpt.api.admission.clock import Clock
from nanogpt.api.admission.state import Action, State
from nanogpt.api.admission.subject import Subject
from nanogpt.errors import StartupError

log = logging.getLogger("admission")

MEMORY_S = 86_400.0  # cool-downs of a day lead to a ban


class Strikes:
    """Times of strikes, by subject and rule; the least recently struck subject is forgotten."""

    def __init__(self, max_subjects: int) -> None:
        self._max_subjects = max_subjects
        self._times: OrderedDict[Subject, dict[str, deque[float]]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._times)

    def add(self, subject: Subject, rule: str, now: float, window_s: float, limit: int) -> bool:
        """True when this is the `limit`th within the window; then they start from none again."""
        with self._lock:
            times = self._times.setdefault(subject, {}).setdefault(rule, deque())
            self._times.move_to_end(subject)
            if len(self._times) > self._max_subjects:
                self._times.popitem(last=False)
            while times and times[0] <= now - window_s:
                times.popleft()
            times.append(now)
            if len(times) < limit:
                return False
            times.clear()
            return True

    def of(self, user: str | None, key: str | None) -> dict[Subject, dict[str, list[float]]]:
        """Times by subject and rule, of one user and key, or of any (None)."""
        with self._lock:
            return {
                subject: {rule: list(times) for rule, times in rules.items()}
                for subject, rules in self._times.items()
                if user in (None, subject.user) and key in (None, subject.key)
            }

    def clear(self, subject: Subject) -> None:
        """Forget a subject; key "" is every key."""
        with self._lock:
            for known in [s for s in self._times if s.user == subject.user]:
                if subject.key in ("", known.key):
                    del self._times[known]


class Enforcer:
    """Counts strikes, and shuts out whoever reaches a rule's number. Thread-safe.

    `changed` is called after a new cool-down or ban.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        state: State,
        clock: Clock,
        *,
        max_subjects: int,
        dry_run: bool,
        changed: Callable[[], None],
    ) -> None:
        self._rules, self._state, self._clock = rules, state, clock
        self._dry_run, self._changed = dry_run, changed
        self._strikes = Strikes(max_subjects)

    def strike(self, subject: Subject, rule_name: str) -> list[Action]:
        """One more strike of a user (or of a key, for a request without user), and what follows."""
        rule = self._rules[rule_name]
        if not rule.strikes:
            return []
        now = self._clock.time()
        limits = {subject: rule.strikes}
        if rule.key_strikes and subject.key != ANONYMOUS:  # else one could shut everybody out
            limits[Subject(subject.key, "")] = rule.key_strikes
        reached = [
            (struck, limit)
            for struck, limit in limits.items()
            if self._strikes.add(struck, rule_name, now, rule.window_s, limit)
        ]
        return [self._act(struck, rule_name, rule, limit, now) for struck, limit in reached]

    def strikes_of(
        self, user: str | None, key: str | None
    ) -> list[tuple[Subject, str, list[float]]]:
        """Times by subject and rule that still count, of one user and key, or of any (None);
        whoever was struck last comes last."""
        now = self._clock.time()
        counted = []
        for subject, rules in self._strikes.of(user, key).items():
            for rule, times in rules.items():
                recent = [time for time in times if time > now - self._rules[rule].window_s]
                if recent:
                    counted.append((subject, rule, recent))
        return counted

    def forget(self, subject: Subject) -> None:
        """Strikes of a subject; a user with key "" is meant under every key."""
        self._strikes.clear(subject)

    def _act(self, subject: Subject, name: str, rule: Rule, limit: int, now: float) -> Action:
        cooldowns = self._cooldowns(subject, name, now) + 1
        kind: Kind = "ban" if 0 < rule.ban_after <= cooldowns else "cooldown"
        if kind == "ban":
            reason, seconds = f"{cooldowns} cool-downs within a day", rule.ban_s
        else:
            reason, seconds = f"{limit} times within {rule.window_s:g} s", rule.cooldown_s
        by = f"rule {name}"
        action = Action(now, *subject, name, kind, reason, self._dry_run)
        self._record(action, Ban(*subject, kind, f"{by}: {reason}", by, now, now + seconds))
        return action

    def _record(self, action: Action, ban: Ban) -> None:
        """A disk that is full or broken lets nobody off: what can't be written holds in memory."""
        try:
            self._state.add_action(action, forget_before=action.time - MEMORY_S)
            if not self._dry_run:
                self._state.put_ban(ban, replace=False)
        except sqlite3.Error as error:
            log.error(
                "can't record what rule %s did (%s): it holds until this process ends",
                action.rule,
                error,
            )
            if not self._dry_run:
                self._state.hold(ban)
        if not self._dry_run:
            # Whoever reads the file next finds and reports what is wrong with it.
            with contextlib.suppress(sqlite3.Error, StartupError):
                self._changed()

    def _cooldowns(self, subject: Subject, rule: str, now: float) -> int:
        """Those of the last day, since the last ban; none that can't be read."""
        count = 0
        try:
            actions = self._state.actions(now - MEMORY_S, subject.user, subject.key)
        except sqlite3.Error as error:
            log.error("can't read what rule %s did before (%s)", rule, error)
            return 0
        for action in actions:
            if action.rule == rule and action.dry_run == self._dry_run:
                count = count + 1 if action.kind == "cooldown" else 0
        return count
