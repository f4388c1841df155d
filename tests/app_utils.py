"""The application on a fake cluster, for tests of the HTTP layer."""

from typing import Any

import flask
import httpx
import openai

import frontend
from nanogpt.admission_config import MEMORY_STATE, AdmissionConfig
from nanogpt.api.admission import Admission
from nanogpt.config import HttpConfig, convert
from tests.fake_cluster import CARDS, INFO, FakeCluster

NAME = INFO.name
KEY, OTHER_KEY, ADMIN_KEY = "k" * 24, "o" * 24, "a" * 24
# What an operator sets to close the server: two keys for users and one for the operator.
CLOSED = {"NANOGPT_API_KEYS": f"team-a={KEY},team-b={OTHER_KEY}", "NANOGPT_ADMIN_KEY": ADMIN_KEY}


def make_app(
    cluster: FakeCluster,
    settings: HttpConfig | None = None,
    table: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    **more: Any,
) -> flask.Flask:
    """`table`: [admission] of the configuration file, which is kept in memory by default; `more`
    goes to create_app."""
    config = convert({"state": MEMORY_STATE, **(table or {})}, AdmissionConfig)
    admission = Admission(config, environ or {})
    return frontend.create_app(
        cluster,
        settings or HttpConfig(),
        admission,
        CARDS,
        **{"clock": lambda: 1234.5, "residents": cluster, **more},
    )


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def complete(client, headers=None, **fields):
    return client.post(
        "/v1/completions", json={"model": NAME, "prompt": "hi", **fields}, headers=headers
    )


def official_client(app: flask.Flask, key: str) -> openai.OpenAI:
    """OpenAI's client, which calls the application without a socket."""
    transport = httpx.WSGITransport(app=app)
    return openai.OpenAI(
        base_url="http://test/v1",
        api_key=key,
        max_retries=0,
        http_client=httpx.Client(transport=transport),
    )


def assert_error(response, status, kind="invalid_request_error", code=None, param=None):
    assert response.status_code == status
    assert response.content_type == "application/json"
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
