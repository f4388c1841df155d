"""The table [admission] of the configuration file: keys, limits, rules, state and audit log."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from nanogpt.errors import ConfigError
from nanogpt.section import Section

# A key's name goes into logs, headers of other systems and file formats: keep it plain.
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ANONYMOUS = "anonymous"  # the name that requests run under while no keys are configured
MEMORY_STATE = ":memory:"

Number = Annotated[int, Meta(ge=0)]
RuleSeconds = Annotated[float, Meta(ge=1, le=31_536_000)]  # up to a year


class Limits(Section, frozen=True, kw_only=True):
    """Over any 60 seconds; 0 is no limit."""

    requests_per_minute: Number = 0
    tokens_per_minute: Number = 0  # of prompts and of what is generated


class OwnLimits(Section, frozen=True, kw_only=True):
    """What a key has instead of the limits of all; null: the same."""

    requests_per_minute: Number | None = None
    tokens_per_minute: Number | None = None

    def over(self, common: Limits) -> Limits:
        requests, tokens = self.requests_per_minute, self.tokens_per_minute
        return Limits(
            requests_per_minute=common.requests_per_minute if requests is None else requests,
            tokens_per_minute=common.tokens_per_minute if tokens is None else tokens,
        )


class KeyConfig(Section, frozen=True, kw_only=True):
    """What a key may do. Its secret is `sha256` here, or stands in NANOGPT_API_KEYS."""

    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    admin: bool = False  # for the routes of operators; never limited or banned
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0  # its share when the server is full
    models: tuple[str, ...] = ()  # the only ones that it may use; empty: all
    limits: OwnLimits = OwnLimits()  # over [admission.key_limits]
    user_limits: OwnLimits = OwnLimits()  # over [admission.user_limits]


class Rule(Section, frozen=True, kw_only=True):
    """`strikes` within `window_s` are a cool-down; the `ban_after`th of a day is a ban."""

    strikes: Number  # 0: the rule never acts
    window_s: RuleSeconds = 60.0
    key_strikes: Number = 0  # of all users of a key together; 0: a user never harms its key
    cooldown_s: RuleSeconds = 60.0
    ban_after: Number = 10  # 0: never a ban
    ban_s: RuleSeconds = 3600.0


class RefusalRule(Rule, frozen=True, kw_only=True):
    """A strike for each answer that says that the request was wrong (4xx)."""

    strikes: Number = 100


class BurstRule(Rule, frozen=True, kw_only=True):
    """A strike each time that more than `requests` requests come within `seconds`."""

    strikes: Number = 3
    requests: Annotated[int, Meta(ge=2)] = 300
    seconds: RuleSeconds = 10.0


class ContentRule(Rule, frozen=True, kw_only=True):
    """A prompt that matches is refused, and is a strike."""

    strikes: Number = 5
    window_s: RuleSeconds = 3600.0
    cooldown_s: RuleSeconds = 300.0
    ban_after: Number = 3
    ban_s: RuleSeconds = 86_400.0
    terms: tuple[str, ...] = ()  # literal, whole words, whatever their case
    terms_file: str = ""  # more of them, one a line
    patterns: dict[str, str] = {}  # name = regular expression
    pattern_timeout_ms: Annotated[float, Meta(ge=1, le=1000)] = 20.0  # for each pattern and prompt
    total_timeout_ms: Annotated[float, Meta(ge=1, le=5000)] = 100.0  # for all patterns of a request


class AdmissionConfig(Section, frozen=True, kw_only=True):
    """Who may use the endpoint, and how much."""

    state: str = ""  # SQLite file of keys and bans; empty: below ~/.local/state
    keys: dict[str, KeyConfig] = {}
    key_limits: Limits = Limits()
    user_limits: Limits = Limits()
    max_users: Annotated[int, Meta(ge=100, le=10_000_000)] = 100_000  # remembered at once
    redis_url: str = ""  # share limits and bans between servers
    redis_down: Literal["local", "refuse"] = "local"  # limit in this process, or answer 503
    dry_run: bool = False  # the rules only report what they would have done
    refusals: RefusalRule = RefusalRule()
    bursts: BurstRule = BurstRule()
    content: ContentRule = ContentRule()
    audit: bool = True
    audit_file: str = ""  # empty: audit.jsonl beside the state
    audit_max_mib: Annotated[int, Meta(ge=1, le=1024)] = 10  # then it is rotated
    audit_backups: Annotated[int, Meta(ge=1, le=100)] = 4

    def __post_init__(self) -> None:
        for name in self.keys:
            if not KEY_NAME.fullmatch(name) or name == ANONYMOUS:
                raise ValueError(
                    f"key name {name!r}: use up to 64 letters, digits, '.', '_' and '-', "
                    f"and not {ANONYMOUS!r}"
                )

    @property
    def state_path(self) -> str:
        """Where keys and bans are kept: a file's path, or ":memory:"."""
        return self.state if self.state == MEMORY_STATE else str(_state_path(self.state))

    @property
    def audit_path(self) -> Path | None:
        """The audit log's path; None when there is none."""
        if not self.audit or (self.state == MEMORY_STATE and not self.audit_file):
            return None
        if self.audit_file:
            return Path(self.audit_file).expanduser().absolute()
        return Path(self.state_path).with_name("audit.jsonl")


def _state_path(given: str) -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(given or f"{base}/nanogpt/admission.sqlite").expanduser().absolute()
    except RuntimeError as error:  # no HOME, and no such user in the password file
        raise ConfigError(
            f"can't tell where to keep keys and bans: {error}; set admission.state to a file"
        ) from error
