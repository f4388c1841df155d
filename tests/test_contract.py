"""Anything at all sent to the application: no answer but a documented one, no error but in shape.

A schema-driven fuzzer finds what one contract forgets; this is its short form, from the same
definitions.
"""

import io
import json
import logging
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt.api.jobs.batches import CreateBatch
from nanogpt.api.openapi import OPERATIONS, document
from nanogpt.api.operators import BanRequest, UnbanRequest
from nanogpt.api.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest
from nanogpt.api.residents import NoBody
from tests.app_utils import ADMIN_KEY, CLOSED, KEY, NAME, bearer
from tests.fake_cluster import INFO
from tests.jobs_utils import jobs_app

TABLE = {
    "key_limits": {"requests_per_minute": 100_000, "tokens_per_minute": 200_000},
    "user_limits": {"requests_per_minute": 20},
    "refusals": {"strikes": 0},
    "bursts": {"strikes": 0},
    "content": {"terms": ["forbidden"], "strikes": 0},
}
PATHS = document()["paths"]

text = st.text(max_size=20) | st.sampled_from(
    ["", NAME, "fake", "a forbidden word", "\ud800", "\0", "é" * 300, "x" * 2000]
)
number = (
    st.integers(-3, 30)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**40])
    | st.floats(allow_nan=True, allow_infinity=True)
)
value = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
FITTING = {
    "model": st.just(NAME),
    "prompt": text | st.lists(text, max_size=3) | st.lists(st.integers(0, 270), max_size=9),
    "stream": st.booleans(),
    "reason": st.just("spam"),
    "endpoint": st.just("/v1/completions"),
    "completion_window": st.just("24h"),
    "tokens": st.lists(st.integers(0, 264), max_size=5),
}
header_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
header_names = st.sampled_from(
    [
        "Accept",
        "Authorization",
        "Content-Encoding",
        "Content-Type",
        "Idempotency-Key",
        "Origin",
        "Range",
        "X-Forwarded-For",
        "X-Request-Id",
    ]
)


@st.composite
def bodies(draw, kind: type[msgspec.Struct]) -> bytes:
    """Mostly an object with known fields, each fitting or not."""
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    fields = draw(st.dictionaries(st.sampled_from(names) if names else text, value, max_size=4))
    for name, fitting in FITTING.items():
        if name in names and draw(st.integers(0, 3)):
            fields[name] = draw(fitting)
    body = json.dumps(fields).encode()
    if not draw(st.integers(0, 9)):
        body = draw(
            st.binary(max_size=30) | st.just(body[:-1]) | value.map(json.dumps).map(str.encode)
        )
    return body


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("jobs")
    with jobs_app(directory, table=TABLE, environ=CLOSED) as app:
        client = app.test_client()
        form = {"purpose": "batch", "file": (io.BytesIO(b"{}\n"), "in.jsonl")}
        uploaded = client.post("/v1/files", data=form, headers=bearer(KEY))
        FITTING["input_file_id"] = st.just(uploaded.json["id"])
        yield client


def check(client, operation, headers, *, body=b"", names=None, query=""):
    path = operation.path
    for name, given_value in (names or {}).items():
        path = path.replace(f"{{{name}}}", quote(given_value, safe="", errors="replace"))
    response = client.open(
        path + query, method=operation.method.upper(), data=body, headers=headers
    )
    documented = PATHS[operation.path][operation.method]["responses"]
    content = response.get_data()
    assert str(response.status_code) in documented, (response.status_code, content)
    assert response.status_code not in (500, 503), content
    kind = response.content_type.partition(";")[0]
    assert kind in documented[str(response.status_code)]["content"]
    if response.status_code >= 400:
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(error["message"]) < 2000
    elif kind == "text/event-stream":
        assert content.endswith(b"data: [DONE]\n\n")
    elif kind == "application/json":
        json.loads(content)
    assert response.headers["x-request-id"]
    return response


with_bodies = [o for o in OPERATIONS if o.body is not None]


@pytest.mark.parametrize("operation", with_bodies, ids=lambda o: o.path)
def test_any_body(client, operation, caplog):
    kinds = (CompletionRequest, TokenizeRequest, DetokenizeRequest, BanRequest, UnbanRequest)
    assert operation.body in (*kinds, CreateBatch, NoBody)
    seen = set()

    @settings(
        max_examples=400 if operation.body is CompletionRequest else 60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(body=bodies(operation.body), user=st.text(min_size=1, max_size=20))
    def run(body, user):
        headers = {**bearer(ADMIN_KEY if operation.access == "admin" else KEY)}
        headers["Content-Type"] = "application/json"
        names = {"user": user, "key": "team-b", "id": INFO.name}
        seen.add(check(client, operation, headers, body=body, names=names).status_code)

    run()
    assert {200, 400} <= seen  # else it tests too little
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_any_headers_and_names(client, operation, caplog):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        headers=st.dictionaries(
            header_names, header_text | text.map(lambda t: quote(t, errors="replace"))
        ),
        key=st.sampled_from([KEY, ADMIN_KEY, ""]),
        name=st.text(min_size=1, max_size=20),
        query=st.dictionaries(st.sampled_from(["key", "model", "x"]), text, max_size=2),
    )
    def run(headers, key, name, query):
        if key:
            headers = {**headers, **bearer(key)}
        pairs = [f"{k}={quote(v, safe='', errors='replace')}" for k, v in query.items()]
        text_of_query = "?" + "&".join(pairs) if pairs else ""
        names = {"id": name, "user": name, "key": name.replace("/", "-")}
        check(client, operation, headers, names=names, query=text_of_query)

    run()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
