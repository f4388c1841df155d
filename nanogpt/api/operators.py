"""The routes of operators: who is shut out and why, banning and unbanning."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nanogpt.api.admission import Admission
from nanogpt.api.admission.bans import MAX_BAN_S, MAX_REASON_CHARS, Ban
from nanogpt.api.admission.explain import Strike
from nanogpt.api.answer import Answer
from nanogpt.api.decode import check_content_type, decode
from nanogpt.api.response import encode


class BanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a ban."""

    reason: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_REASON_CHARS,
            description=f"a text of 1 to {MAX_REASON_CHARS} characters; the banned will read it",
        ),
    ]
    expires_in: (
        Annotated[float, Meta(gt=0, le=MAX_BAN_S, description="seconds; null: for good")] | None
    ) = None


class UnbanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of an unban; may be left out."""


class Blocked(msgspec.Struct):
    """Bans and cool-downs in force, of users and of keys, and the latest strikes that count."""

    bans: list[Ban]
    strikes: list[Strike]
    object: Literal["list"] = "list"


class Lifted(msgspec.Struct):
    """What was in force until now."""

    lifted: list[Ban]


class Operators:
    """Thread-safe. `by` is the name of the operator's key; `key` "" means any key."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def blocked(self) -> Answer:
        return Answer(encode(Blocked(self._admission.bans(), self._admission.strikes())))

    def ban(
        self, body: bytes, content_type: str | None, *, user: str = "", key: str = "", by: str
    ) -> Answer:
        check_content_type(content_type)
        request = decode(body, BanRequest)
        ban = self._admission.ban(
            user=user, key=key, reason=request.reason, seconds=request.expires_in, by=by
        )
        return Answer(encode(ban))

    def unban(self, body: bytes, *, user: str = "", key: str = "", by: str) -> Answer:
        decode(body or b"{}", UnbanRequest)
        return Answer(encode(Lifted(self._admission.unban(user=user, key=key, by=by))))

    def explain(self, *, user: str = "", key: str = "") -> Answer:
        return Answer(encode(self._admission.explain(user, key or None)))
