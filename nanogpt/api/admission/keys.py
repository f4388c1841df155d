"""API keys: what a client presents, and who it is then.

A key is 256 random bits, so nobody finds it from its SHA-256; a slow hash protects what people
choose, and would cost each request a tenth of a second. Only the digest is kept, and no message
or log repeats any part of a key.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping

import msgspec

from nanogpt.admission_config import ANONYMOUS, KEY_NAME, AdmissionConfig, KeyConfig, Limits
from nanogpt.errors import ConfigError, Unauthorized

PREFIX = "sk-ngpt-"
MIN_KEY_CHARS = 20  # of a key that somebody chose: NANOGPT_API_KEYS
MAX_KEY_CHARS = 512
KEYS_VARIABLE = "NANOGPT_API_KEYS"
ADMIN_VARIABLE = "NANOGPT_ADMIN_KEY"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key at rest. A revoked one still counts as configured: the server stays closed."""

    name: str
    settings: KeyConfig  # with the digest
    created: float = 0.0  # seconds since the epoch; 0: from the configuration
    revoked: float | None = None


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who a request comes from, once its key is known."""

    key_name: str
    admin: bool = False
    weight: float = 1.0
    models: tuple[str, ...] = ()  # the only ones that it may use, by any of their names
    limits: Limits = Limits()
    user_limits: Limits = Limits()


def generate() -> str:
    """A new key, to be shown once."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def check_name(name: str) -> None:
    """Raises ConfigError for a name that a key can't have."""
    if not KEY_NAME.fullmatch(name) or name == ANONYMOUS:
        raise ConfigError(
            f"key name {name!r}: use up to 64 letters, digits, '.', '_' and '-', "
            f"and not {ANONYMOUS!r}"
        )


def configured(config: AdmissionConfig, environ: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys of configuration and variables. Raises ConfigError.

    NANOGPT_API_KEYS is "KEY" or "NAME=KEY,NAME=KEY"; NANOGPT_ADMIN_KEY one key. What else a key
    may do stands in [admission.keys.NAME].
    """
    given = _variables(environ)
    settings: dict[str, KeyConfig] = dict(config.keys)
    for name, (key, admin) in given.items():
        known = settings.get(name, KeyConfig())
        if known.sha256:
            raise ConfigError(f"key {name!r} has a sha256 in the file and a value in a variable")
        settings[name] = msgspec.structs.replace(
            known, sha256=digest(key), admin=admin or known.admin
        )
    for name, setting in settings.items():
        if not setting.sha256:
            raise ConfigError(
                f"admission.keys.{name} has no sha256, and {KEYS_VARIABLE} has no {name}=KEY"
            )
    if len({setting.sha256 for setting in settings.values()}) < len(settings):
        raise ConfigError("two names have the same key")
    return tuple(Key(name=name, settings=setting) for name, setting in settings.items())


def _variables(environ: Mapping[str, str]) -> dict[str, tuple[str, bool]]:
    found: dict[str, tuple[str, bool]] = {}
    for part in filter(None, map(str.strip, environ.get(KEYS_VARIABLE, "").split(","))):
        before, separator, after = part.partition("=")
        name, key = (before.strip(), after.strip()) if separator else ("default", part)
        _add(found, name, key, KEYS_VARIABLE, admin=False)
    admin_key = environ.get(ADMIN_VARIABLE, "").strip()
    if admin_key:
        _add(found, "admin", admin_key, ADMIN_VARIABLE, admin=True)
    return found


def _add(
    found: dict[str, tuple[str, bool]], name: str, key: str, variable: str, *, admin: bool
) -> None:
    if not KEY_NAME.fullmatch(name) or name == ANONYMOUS:  # not repeated: it may be half a key
        raise ConfigError(f"{variable}: write NAME=KEY, with a name like team-a")
    if not re.fullmatch(rf"[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}", key):
        raise ConfigError(
            f"{variable}: a key must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS} ASCII characters, "
            "none of them a space; for example from: openssl rand -hex 32"
        )
    if name in found:
        raise ConfigError(f"{variable}: one name is there twice")
    found[name] = (key, admin)


class KeyRing:
    """The keys of one moment."""

    def __init__(self, config: AdmissionConfig, keys: Iterable[Key]) -> None:
        self._config = config
        self._by_digest: dict[str, Principal] = {}
        self._anonymous = Principal(
            key_name=ANONYMOUS, limits=config.key_limits, user_limits=config.user_limits
        )
        self.closed = False  # a key is needed
        for key in keys:
            self.closed |= not key.settings.admin
            if key.revoked is None:
                self._by_digest[key.settings.sha256] = self._principal(key)

    def _principal(self, key: Key) -> Principal:
        settings = key.settings
        return Principal(
            key_name=key.name,
            admin=settings.admin,
            weight=settings.weight,
            models=settings.models,
            limits=settings.limits.over(self._config.key_limits),
            user_limits=settings.user_limits.over(self._config.user_limits),
        )

    def find(self, authorization: str | None, *, admin: bool) -> Principal:
        """Whose key it is, or Anonymous while no keys are configured. Raises Unauthorized."""
        principal = self._presented(authorization)
        if principal is not None and (principal.admin or not admin):
            return principal
        if admin:
            raise _unauthorized(
                "this route needs an admin key: 'Authorization: Bearer KEY'; "
                "make one with: python -m nanogpt.admin keys create NAME --admin, "
                f"or set {ADMIN_VARIABLE}",
                authorization,
            )
        if not self.closed:
            return self._anonymous
        if authorization is None:
            raise _unauthorized(
                "this server needs an API key: send the header 'Authorization: Bearer KEY'",
                authorization,
            )
        raise _unauthorized(
            "the API key is not valid here: it must be 'Authorization: Bearer KEY' with a key "
            "that the operator of this server gave you",
            authorization,
        )

    def principals(self) -> list[Principal]:
        """All that may come, also the anonymous one while no key is needed."""
        return [*self._by_digest.values(), *(() if self.closed else (self._anonymous,))]

    def named(self, name: str) -> Principal | None:
        return next((p for p in self.principals() if p.key_name == name), None)

    def _presented(self, authorization: str | None) -> Principal | None:
        match = re.fullmatch(r"(?i:bearer) +(\S+) *", authorization or "")
        if match is None or len(match[1]) > MAX_KEY_CHARS:
            return None
        presented = digest(match[1])
        # How long the look-up takes depends on a digest that nobody can steer; the comparison
        # that decides takes the same time wherever the two differ.
        known = presented if presented in self._by_digest else "0" * len(presented)
        return self._by_digest[known] if hmac.compare_digest(presented, known) else None


def _unauthorized(message: str, authorization: str | None) -> Unauthorized:
    problem = "" if authorization is None else ', error="invalid_token"'
    return Unauthorized(message, headers={"WWW-Authenticate": f'Bearer realm="nanogpt"{problem}'})
