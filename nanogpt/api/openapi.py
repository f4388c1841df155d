"""The contract as OpenAPI 3.1, made from the structs that validate requests and shape answers."""

import re
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Struct

from nanogpt import __version__
from nanogpt.api import objects, operators, residents
from nanogpt.api.admission.bans import Ban
from nanogpt.api.admission.explain import Explanation
from nanogpt.api.jobs import once
from nanogpt.api.jobs.objects import StoredCompletion
from nanogpt.api.jobs.operations import JOB_OPERATIONS
from nanogpt.api.operation import ACCESS_ERRORS, ADMIN_ERRORS, BODY_ERRORS, Access, Operation
from nanogpt.api.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest

OPERATIONS = (
    Operation(
        method="post",
        path="/v1/completions",
        summary="Complete one or more prompts, at once or as a stream of server-sent events; with "
        "background in a while.",
        body=CompletionRequest,
        answer=objects.Completion,
        errors=BODY_ERRORS,
        streams=True,
        accepted=StoredCompletion,
        once=True,
    ),
    *JOB_OPERATIONS,
    Operation(
        method="get",
        path="/v1/models",
        summary="The models that are served, and those that could be.",
        answer=objects.ModelList,
    ),
    Operation(
        method="get",
        path="/v1/models/{id}",
        summary="One model. Its name may contain slashes.",
        answer=objects.Model,
        errors=(404, 500, 503),
    ),
    Operation(
        method="post",
        path="/tokenize",
        summary="Text to token ids. Without model: the only one that is loaded.",
        body=TokenizeRequest,
        answer=objects.TokenizeResponse,
        errors=BODY_ERRORS,
    ),
    Operation(
        method="post",
        path="/detokenize",
        summary="Token ids to text.",
        body=DetokenizeRequest,
        answer=objects.DetokenizeResponse,
        errors=BODY_ERRORS,
    ),
    Operation(
        method="get",
        path="/tokenizer_info",
        summary="Special tokens and limits of a tokenizer.",
        answer=objects.TokenizerInfo,
        query=("model",),
        errors=(400, 404, 500, 503),
    ),
    Operation(
        method="get",
        path="/health",
        summary="200 while this process answers.",
        answer=objects.Health,
        access="open",
    ),
    Operation(
        method="get",
        path="/ready",
        summary="200 while a model answers, else 503.",
        answer=objects.Readiness,
        access="open",
        also_answers=(503,),
    ),
    Operation(
        method="get",
        path="/metrics",
        summary="Counters, gauges and histograms for Prometheus.",
        answer="text/plain",
    ),
    Operation(
        method="get",
        path="/openapi.json",
        summary="This contract as OpenAPI 3.1.",
        answer="application/json",
    ),
    Operation(method="get", path="/docs", summary="This contract as a page.", answer="text/html"),
    Operation(
        method="get",
        path="/admin/models",
        summary="The models that are served, and their memory.",
        answer=residents.ResidentList,
        access="admin",
        errors=(400, 500),
    ),
    *(
        Operation(
            method="post",
            path=f"/admin/models/{{id}}/{command}",
            summary=summary,
            body=residents.NoBody,
            body_required=False,
            answer=residents.Resident,
            access="admin",
            errors=(*ADMIN_ERRORS, 409, 503),
        )
        for command, summary in (
            ("load", "Have a model loaded on all ranks, as soon as there is room."),
            ("unload", "Have a model unloaded, once what runs on it has finished."),
            ("pin", "Have a model loaded, and kept whatever others need."),
            ("unpin", "Let a model go again when others need its memory."),
        )
    ),
    Operation(
        method="get",
        path="/admin/users",
        summary="Bans and cool-downs in force, of users and of keys, and strikes that count.",
        answer=operators.Blocked,
        access="admin",
        errors=(400, 500),
    ),
    Operation(
        method="post",
        path="/admin/users/{user}/ban",
        summary="Shut a user out, under one API key (its name) or any.",
        body=operators.BanRequest,
        answer=Ban,
        query=("key",),
        access="admin",
        errors=ADMIN_ERRORS,
    ),
    Operation(
        method="post",
        path="/admin/users/{user}/unban",
        summary="Lift bans and cool-downs of a user, and forget its strikes.",
        body=operators.UnbanRequest,
        body_required=False,
        answer=operators.Lifted,
        query=("key",),
        access="admin",
        errors=ADMIN_ERRORS,
    ),
    Operation(
        method="get",
        path="/admin/users/{user}/explain",
        summary="Why is this user blocked? Bans, what rules did, strikes, limits, last decisions.",
        answer=Explanation,
        query=("key",),
        access="admin",
        errors=(400, 404, 500),
    ),
    Operation(
        method="post",
        path="/admin/keys/{key}/ban",
        summary="Shut an API key out, by its name.",
        body=operators.BanRequest,
        answer=Ban,
        access="admin",
        errors=ADMIN_ERRORS,
    ),
    Operation(
        method="post",
        path="/admin/keys/{key}/unban",
        summary="Lift bans and cool-downs of an API key itself, and forget its strikes.",
        body=operators.UnbanRequest,
        body_required=False,
        answer=operators.Lifted,
        access="admin",
        errors=ADMIN_ERRORS,
    ),
    Operation(
        method="get",
        path="/admin/keys/{key}/explain",
        summary="Why is this API key blocked?",
        answer=Explanation,
        access="admin",
        errors=(400, 404, 500),
    ),
)


_BEARER = "key"
# An empty object: it also goes without, where no keys are configured.
_SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    "open": [],
    "key": [{}, {_BEARER: []}],
    "admin": [{_BEARER: []}],
}


def document() -> dict[str, Any]:
    """The whole OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nanoGPT and GPT-2 behind OpenAI's completions API",
            "version": __version__,
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {_BEARER: {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas() -> dict[str, Any]:
    answers = [o.answer for o in OPERATIONS if not isinstance(o.answer, str)]
    answers += [o.accepted for o in OPERATIONS if o.accepted is not None]
    requests = {kind for o in OPERATIONS for kind in (o.body, o.form) if kind is not None}
    kinds = [*requests, *answers, objects.ErrorResponse]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in requests:
        _allow_null(schemas[kind.__name__])
    return schemas


def _allow_null(schema: dict[str, Any]) -> None:
    """In a request null stands for the default of every field that has one (see decode.py)."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()):
            continue
        if {"type": "null"} in field.get("anyOf", ()):
            continue
        outer = {k: field.pop(k) for k in ("default", "description") if k in field}
        schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outer}


def _ref(kind: type[Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}_{operation.path.strip('/')}".replace("/", "_"),
        "responses": _responses(operation),
        "security": _SECURITY[operation.access],
    }
    for kind, media in (
        (operation.body, "application/json"),
        (operation.form, "multipart/form-data"),
    ):
        if kind is not None:
            described["requestBody"] = {
                "required": operation.body_required,
                "content": {media: {"schema": _ref(kind)}},
            }
    parameters = [("query", name) for name in operation.query]
    parameters += [("header", once.HEADER)] if operation.once else []
    parameters += [("path", name) for name in re.findall(r"\{(\w+)\}", operation.path)]
    if parameters:
        described["parameters"] = [
            {"in": where, "name": name, "required": where == "path", "schema": {"type": "string"}}
            for where, name in parameters
        ]
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    if isinstance(operation.answer, str):
        content: dict[str, Any] = {operation.answer: {}}
    else:
        content = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.streams:
        content["text/event-stream"] = {
            "schema": {
                "type": "string",
                "description": "with stream: events 'data: {a Completion}', or one "
                "'data: {an ErrorResponse}'; the last is 'data: [DONE]'",
            }
        }
    error = {
        "description": "error",
        "content": {"application/json": {"schema": _ref(objects.ErrorResponse)}},
    }
    conflict = (HTTPStatus.CONFLICT.value,) if operation.once else ()
    errors = (*operation.errors, *ACCESS_ERRORS[operation.access], *conflict)
    responses = {str(status): error for status in errors}
    for status in (200, *operation.also_answers):
        responses[str(status)] = {"description": "answer", "content": content}
    if operation.accepted is not None:
        stored = {"application/json": {"schema": _ref(operation.accepted)}}
        responses["202"] = {"description": "accepted", "content": stored}
    return dict(sorted(responses.items()))
