"""One route of the contract, as openapi.py writes it down."""

from typing import Literal

from msgspec import Struct

Access = Literal["open", "key", "admin"]  # "key": where keys are configured


class Operation(Struct, frozen=True, kw_only=True):
    """One route. `errors`: statuses that answer with an error object, besides those of `access`."""

    method: str
    path: str
    summary: str
    answer: type[Struct] | str  # a struct as JSON, or a content type
    body: type[Struct] | None = None
    query: tuple[str, ...] = ()  # all optional
    body_required: bool = True
    access: Access = "key"
    errors: tuple[int, ...] = (500,)
    streams: bool = False
    also_answers: tuple[int, ...] = ()  # further statuses with the same object
    accepted: type[Struct] | None = None  # the object of a 202
    form: type[Struct] | None = None  # the parts of a multipart/form-data body
    once: bool = False  # takes an Idempotency-Key


BODY_ERRORS = (400, 404, 408, 413, 415, 500, 503)
ADMIN_ERRORS = (400, 404, 408, 413, 415, 500)
# What authentication may answer. A key may be banned, or have to pause.
ACCESS_ERRORS: dict[Access, tuple[int, ...]] = {
    "open": (),
    "key": (401, 403, 429),
    "admin": (401,),
}
