"""A JSON body as a typed request: every mistake is a 400 that names the field.

Fields are decoded one by one, so an error belongs to exactly one of them, and null stands for a
field's default without widening its type.
"""

import functools
import re
from typing import Any, TypeVar, get_args

import msgspec

from nanogpt.config import nearest
from nanogpt.errors import InvalidRequest, UnsupportedMediaType

ECHO_CHARS = 200  # of a client's input that an error message may repeat

T = TypeVar("T", bound=msgspec.Struct)
# An escape for a high surrogate without a low one behind it, or for a low one without a high one.
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]", re.DOTALL
)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


def clip(text: str, limit: int = ECHO_CHARS) -> str:
    """At most `limit` characters of what a client sent, as it may stand in a message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_content_type(content_type: str | None) -> None:
    """Raises UnsupportedMediaType unless it is JSON."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f"got {clip(kind, 100)!r}" if kind else "there is none"
        raise UnsupportedMediaType(
            f"Content-Type must be application/json, {said}; "
            "send the header 'Content-Type: application/json' and a JSON object as the body"
        )


def decode(body: bytes, kind: type[T]) -> T:
    """The request in `body`. Raises InvalidRequest."""
    fields = _fields(kind)
    values: dict[str, Any] = {}
    for name, raw in _object(body).items():
        field = fields.get(name)
        if field is None:
            raise _unknown(name, list(fields))
        if bytes(raw).strip() != b"null":
            values[name] = field.decode(raw)
    for name, field in fields.items():
        if field.required and name not in values:
            raise InvalidRequest(
                f"{name} is missing; send {field.allowed or 'a value for it'}", param=name
            )
    return kind(**values)


def _object(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _OBJECT.decode(body)
    except msgspec.ValidationError as error:
        problem = f"it must be a JSON object ({str(error).replace('`', '')})"
    except msgspec.DecodeError as error:
        problem = f"it is not valid JSON: {error}" if body else "it is empty; send a JSON object"
        if _HALF_PAIR.search(body):
            problem = "a string has half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    except UnicodeDecodeError:
        problem = "it is not valid UTF-8"
    except RecursionError:
        problem = "it is nested too deeply"
    raise InvalidRequest(f"can't read the request body: {problem}")


def _unknown(name: str, known: list[str]) -> InvalidRequest:
    hint = nearest(name, known) if len(name) <= 100 else ""
    return InvalidRequest(
        f"unknown field {clip(name)!r}{hint or '; known are: ' + ', '.join(known)}",
        param=clip(name),
    )


class _Field:
    def __init__(self, info: msgspec.structs.FieldInfo) -> None:
        self.name = info.encode_name
        self.required = info.required
        self.allowed = _description(info.type)
        self._decoder = msgspec.json.Decoder(info.type)

    def decode(self, raw: msgspec.Raw) -> Any:
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            problem = clip(_plain(str(error)))  # it may name an unknown field of the client's
        except msgspec.DecodeError as error:
            problem = f"malformed value ({error})"
        except UnicodeDecodeError:
            problem = "text that is not valid UTF-8"
        except RecursionError:
            problem = "nested too deeply"
        got = clip(bytes(raw)[: ECHO_CHARS * 4].decode(errors="replace"), 100)
        allowed = f". Allowed: {self.allowed}" if self.allowed else ""
        raise InvalidRequest(f"{self.name}: {problem}; got {got}{allowed}", param=self.name)


def _plain(message: str) -> str:
    """msgspec's message without its notation: "expected int >= 1 at [0]"."""
    text = message.replace(" - at `key` in `$`", " for a key")
    text = text.replace(" - at `$", " at `").replace("`", "")
    return text[:1].lower() + text[1:]


def _description(kind: Any) -> str:
    """The description in a field's annotation, also under `| None`."""
    for meta in getattr(kind, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description
    return next(filter(None, map(_description, get_args(kind))), "")


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, _Field]:
    return {info.encode_name: _Field(info) for info in msgspec.structs.fields(kind)}
