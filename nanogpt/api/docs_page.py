"""The OpenAPI document as one HTML page without scripts."""

import json
from html import escape
from typing import Any

# Nothing is loaded from anywhere, and nothing runs.
SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h2 { border-top: 1px solid #ccc; padding-top: 1rem; } code { font-size: 0.9em; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top;
       padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; }
       a { color: #8bf; } th, td, h2 { border-color: #444; } }
"""


def render(document: dict[str, Any]) -> str:
    """The page for this OpenAPI document."""
    schemas = document["components"]["schemas"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{escape(document['info']['title'])}</title><style>{_STYLE}</style>",
        f"<h1>{escape(document['info']['title'])}</h1>",
        f"<p>Version {escape(document['info']['version'])}. For programs: "
        "<a href=/openapi.json>openapi.json</a>.</p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(method, path, operation))
    parts += ["<h2>Objects</h2>"]
    parts += [
        f"<h3 id={name}><code>{name}</code></h3>{_fields(schema)}"
        for name, schema in schemas.items()
        if schema.get("properties")
    ]
    return "".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    text = (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
        f"<p>{escape(operation['summary'])}</p>"
    )
    body = operation.get("requestBody")
    if body:
        kinds = (_answer(kind, media) for kind, media in body["content"].items())
        text += f"<p>Body: {' or '.join(kinds)}</p>"
    answers = [
        f"{status} {' or '.join(_answer(kind, media) for kind, media in r['content'].items())}"
        for status, r in operation["responses"].items()
    ]
    return text + f"<p>Answers: {'; '.join(answers)}</p>"


def _answer(content_type: str, media: dict[str, Any]) -> str:
    reference = media.get("schema", {}).get("$ref")
    return _link(_name(reference)) if reference else f"<code>{escape(content_type)}</code>"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in required else escape(json.dumps(field.get("default")))
        rows.append(
            f"<tr><td><code>{escape(name)}</code><td>{_kind(field)}"
            f"<td>{default}<td>{escape(_description(field))}"
        )
    head = "<tr><th>field<th>type<th>default<th>allowed"
    return f"<table>{head}{''.join(rows)}</table>"


def _description(field: dict[str, Any]) -> str:
    if "description" in field:
        return str(field["description"])
    return next(filter(None, map(_description, field.get("anyOf", ()))), "")


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return _link(_name(field["$ref"]))
    if "anyOf" in field:
        return " or ".join(map(_kind, field["anyOf"]))
    if "enum" in field:
        return escape(", ".join(map(json.dumps, field["enum"])))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return escape(str(field.get("type", "anything")))


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _link(name: str) -> str:
    return f"<a href=#{escape(name)}><code>{escape(name)}</code></a>"
