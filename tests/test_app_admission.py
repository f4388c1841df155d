"""Keys, bans, limits and operators' routes through the whole application."""

import json
import socket
from urllib.parse import quote

import msgspec
import openai
import pytest

from nanogpt.api.openapi import OPERATIONS
from nanogpt.config import HttpConfig
from nanogpt.errors import Unavailable
from tests.app_utils import (
    ADMIN_KEY,
    CLOSED,
    KEY,
    NAME,
    OTHER_KEY,
    assert_error,
    bearer,
    complete,
    make_app,
    official_client,
)
from tests.fake_cluster import INFO, FakeCluster, fail_after, play

ADMIN = bearer(ADMIN_KEY)


@pytest.fixture
def cluster():
    return FakeCluster()


@pytest.fixture
def client(cluster):
    """Of a server that is closed, without limits."""
    return make_app(cluster, environ=CLOSED).test_client()


def call(client, operation, headers=None):
    path = operation.path.format(id=NAME, user="alice", key="team-a")
    body = {"model": NAME} if operation.method == "post" else None
    return client.open(path, method=operation.method.upper(), json=body, headers=headers)


# Keys


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method} {o.path}")
def test_every_route_asks_for_its_key(client, operation):
    allowed = {"open": {None, KEY, ADMIN_KEY}, "key": {KEY, ADMIN_KEY}, "admin": {ADMIN_KEY}}
    for key in (None, "wrong" * 5, KEY, ADMIN_KEY):
        response = call(client, operation, bearer(key) if key else {})
        if operation.access == "open" or key in allowed[operation.access]:
            assert response.status_code not in (401, 403), key
        else:
            assert_error(response, 401, code="invalid_api_key")
            assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_whoever_has_no_key_learns_nothing_of_routes_and_bodies(client, cluster):
    for path in ("/nope", "/v1/completions", "/admin", "/admin/nope", "/v1/models/x"):
        assert_error(client.get(path), 401, code="invalid_api_key")
    assert_error(client.post("/v1/completions", data="{"), 401, code="invalid_api_key")
    assert_error(client.get("/admin/nope", headers=bearer(KEY)), 401, code="invalid_api_key")
    assert_error(client.get("/nope", headers=bearer(KEY)), 404, code="not_found")
    assert not cluster.handles


def test_preflight_needs_no_key(cluster):
    settings = HttpConfig(cors_origins=("https://a.example",))
    client = make_app(cluster, settings, environ=CLOSED).test_client()
    origin = {"Origin": "https://a.example"}
    preflight = client.options("/v1/completions", headers=origin)
    assert preflight.status_code == 200
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    refused = complete(client, headers=origin)
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://a.example"


def test_open_by_default_but_for_operators(cluster):
    client = make_app(cluster).test_client()
    assert complete(client).status_code == 200
    response = complete(client, headers=bearer("whatever"))
    assert response.status_code == 200
    assert not [name for name, _ in response.headers if name.startswith("x-ratelimit")]
    refused = client.get("/admin/users")
    assert_error(refused, 401, code="invalid_api_key")
    assert "NANOGPT_ADMIN_KEY" in refused.json["error"]["message"]


def test_a_key_sees_only_its_models(cluster):
    cluster.infos = {name: msgspec.structs.replace(INFO, name=name) for name in (NAME, "other")}
    table = {"keys": {"team-a": {"models": ["other"]}}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()

    def names(key):
        return [m["id"] for m in client.get("/v1/models", headers=bearer(key)).json["data"]]

    assert names(KEY) == ["other"]
    assert names(OTHER_KEY) == [NAME, "other"]
    for response in (
        complete(client, bearer(KEY)),
        client.get(f"/v1/models/{NAME}", headers=bearer(KEY)),
        client.get(f"/tokenizer_info?model={NAME}", headers=bearer(KEY)),
        client.post("/tokenize", json={"prompt": "x", "model": NAME}, headers=bearer(KEY)),
    ):
        assert_error(response, 404, code="model_not_found", param="model")
        assert NAME not in response.json["error"]["message"].partition("; ")[2]
    assert complete(client, bearer(KEY), model="other").status_code == 200
    # Only one model is left to it, so it need not say which.
    assert client.get("/tokenizer_info", headers=bearer(KEY)).status_code == 200


def test_the_list_of_a_key_may_hold_other_names(cluster):
    """Only a model's very name let a key use it, though any of its names may be asked for."""
    cluster.infos = {name: msgspec.structs.replace(INFO, name=name) for name in (NAME, "other")}
    table = {"keys": {"team-a": {"models": ["fake"]}}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()
    headers = bearer(KEY)
    assert [m["id"] for m in client.get("/v1/models", headers=headers).json["data"]] == [NAME]
    for name in (NAME, "fake", "fake/old-name"):
        assert complete(client, headers, model=name).status_code == 200
    assert_error(
        complete(client, headers, model="other"), 404, code="model_not_found", param="model"
    )
    cluster.infos["fake"] = msgspec.structs.replace(INFO, name="fake")  # now that is the one meant
    assert complete(client, headers, model="fake").status_code == 200
    assert complete(client, headers, model=NAME).status_code == 404


def test_only_an_admin_key_goes_before_everybody_else(client):
    """A priority below 0 preempts the choices of all others."""

    def ask(key, priority):
        body = {"model": NAME, "priority": priority}
        return client.post("/v1/completions", json=body, headers=bearer(key))

    assert_error(ask(KEY, -1), 400, param="priority")
    assert ask(KEY, 1).status_code == 200
    assert ask(ADMIN_KEY, -1).status_code == 200


def test_an_alias_is_a_name_of_the_model(client, cluster):
    assert complete(client, bearer(KEY), model="fake").json["model"] == NAME
    assert client.get("/v1/models/fake/old-name", headers=bearer(KEY)).json["id"] == NAME
    body = {"prompt": "x", "model": "fake"}
    assert client.post("/tokenize", json=body, headers=bearer(KEY)).status_code == 200
    cluster.infos["fake"] = msgspec.structs.replace(INFO, name="fake")  # the very name wins
    assert complete(client, bearer(KEY), model="fake").json["model"] == "fake"


def test_tenant_and_weight(cluster):
    """A share belongs to key and user; the engines learn neither."""
    table = {"keys": {"team-a": {"weight": 3.0}}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()
    for key, user in ((KEY, "u"), (KEY, "u"), (KEY, "v"), (OTHER_KEY, "u"), (KEY, None)):
        complete(client, bearer(key), user=user)
    requests = [handle.request for handle in cluster.handles]
    assert [r.weight for r in requests] == [3.0, 3.0, 3.0, 1.0, 3.0]
    first, same, *others = [r.tenant for r in requests]
    assert first == same
    assert len({first, *others}) == 4
    assert all(len(tenant) == 16 for tenant in (first, *others))


# Bans


def ban(client, user, query="", **fields):
    path = f"/admin/users/{quote(user, safe='')}/ban{query}"
    return client.post(path, json={"reason": "spam", **fields}, headers=ADMIN)


def test_a_banned_user_is_turned_away_before_any_work(client, cluster):
    assert ban(client, "mallory", expires_in=3600).status_code == 200
    before = cluster.tok.encoded
    with pytest.raises(openai.PermissionDeniedError) as refused:
        official_client(client.application, KEY).completions.create(
            model=NAME, prompt="hi", user="mallory"
        )
    error = refused.value
    assert (error.code, error.type) == ("user_banned", "permission_error")
    assert "spam" in error.message
    assert "until" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert cluster.tok.encoded == before
    assert not cluster.handles
    for other in ("alice", None):
        assert complete(client, bearer(KEY), user=other).status_code == 200
    assert complete(client, ADMIN, user="mallory").status_code == 200  # an admin key never is


@pytest.mark.parametrize(
    "wrong",
    [{"priority": -1}, {"temperature": 5}, {"no_such_field": 1}, {"stream_options": {}}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_ban_comes_before_any_other_mistake(client, cluster, wrong):
    """A banned user learnt what was wrong with the request, and it counted against the key."""
    ban(client, "mallory")
    response = complete(client, bearer(KEY), user="mallory", **wrong)
    assert_error(response, 403, "permission_error", "user_banned")
    assert_error(complete(client, bearer(KEY), user="alice", **wrong), 400, param=next(iter(wrong)))
    assert not cluster.handles


@pytest.mark.parametrize("body", [b"{", b'{"user": 1}', b'{"user": "%s"}' % (b"x" * 257), b"[]"])
def test_whose_mistake_it_is_may_be_unknown(client, body):
    headers = {**bearer(KEY), "Content-Type": "application/json"}
    response = client.post("/v1/completions", data=body, headers=headers)
    assert response.status_code == 400


def test_a_mistake_is_its_users_and_not_the_keys(cluster):
    """The user was not yet known when the request was found wrong: a hundred such requests a
    minute, of one user, shut out the whole key."""
    table = {"refusals": {"strikes": 2}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()
    for _ in range(2):
        assert complete(client, bearer(KEY), user="bob", temperature=5).status_code == 400
    assert complete(client, bearer(KEY), user="bob").status_code == 429
    assert complete(client, bearer(KEY), user="alice").status_code == 200
    assert complete(client, bearer(KEY)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_ban_ends_what_runs(client, cluster, stream, monkeypatch):
    """A banned user's 128 choices went on to their last token."""
    monkeypatch.setattr("nanogpt.api.exchange.POLL_S", 0.01)
    cluster.script, cluster.delay_s = play([b"hello " * 10]), 0.02
    submit = cluster.submit

    def then_ban(request):
        handle = submit(request)
        assert ban(client.application.test_client(), "mallory").status_code == 200
        return handle

    cluster.submit = then_ban
    response = complete(client, bearer(KEY), user="mallory", max_tokens=60, stream=stream)
    if stream:
        events = response.get_data(as_text=True).strip().split("\n\n")
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("permission_error", "user_banned")
    else:
        assert_error(response, 403, "permission_error", "user_banned")
    assert cluster.handles[0].cancelled


def test_a_ban_under_one_key_leaves_the_user_of_another(client):
    assert ban(client, "bob", "?key=team-a").json["key"] == "team-a"
    assert complete(client, bearer(KEY), user="bob").status_code == 403
    assert complete(client, bearer(OTHER_KEY), user="bob").status_code == 200


def test_a_banned_key(client):
    path = "/admin/keys/team-a"
    assert client.post(f"{path}/ban", json={"reason": "leaked"}, headers=ADMIN).status_code == 200
    response = client.get("/v1/models", headers=bearer(KEY))
    assert_error(response, 403, "permission_error", "user_banned")
    assert response.headers["x-should-retry"] == "false"
    assert client.get("/v1/models", headers=bearer(OTHER_KEY)).status_code == 200
    assert "leaked" in client.get(f"{path}/explain", headers=ADMIN).json["blocked"]
    (lifted,) = client.post(f"{path}/unban", headers=ADMIN).json["lifted"]
    assert lifted["reason"] == "leaked"
    assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize(
    "user",
    [
        "a b",
        "a/b",
        "/",
        "//x/",
        "..",
        "x/ban",
        "ban",
        "ä€😀",
        "a\nb",
        "\0",
        "%41",
        "a?b#c",
        "x" * 256,
    ],
)
def test_any_user_can_be_banned_and_freed(client, user):
    path = f"/admin/users/{quote(user, safe='')}"
    assert ban(client, user).json["user"] == user
    assert complete(client, bearer(KEY), user=user).status_code == 403
    listed = client.get("/admin/users", headers=ADMIN).json
    assert [b["user"] for b in listed["bans"]] == [user]
    why = client.get(f"{path}/explain", headers=ADMIN).json
    assert (why["user"], why["bans"][0]["by"]) == (user, "admin")
    assert "spam" in why["blocked"]
    lifted = client.post(f"{path}/unban", headers=ADMIN).json["lifted"]
    assert [b["user"] for b in lifted] == [user]
    assert complete(client, bearer(KEY), user=user).status_code == 200


def test_mistakes_of_operators_change_nothing(client):
    def post(path, **fields):
        return client.post(path, json=fields or None, headers=ADMIN)

    ban_path = "/admin/users/bob/ban"
    assert_error(post(ban_path, expires_in=1), 400, param="reason")
    assert_error(post(ban_path, reason=""), 400, param="reason")
    assert_error(post(ban_path, reason="a\nb"), 400, param="reason")
    assert_error(post(ban_path, reason="x", expires_in=0), 400, param="expires_in")
    assert_error(post(ban_path, reason="x", seconds=5), 400, param="seconds")
    assert_error(post(f"{ban_path}?kye=team-a", reason="x"), 400, param="kye")
    assert_error(post(f"{ban_path}?key=nobody", reason="x"), 404, code="not_found", param="key")
    assert_error(post(f"{ban_path}?key=admin", reason="x"), 400, param="key")
    assert_error(post(f"/admin/users/{'x' * 257}/ban", reason="x"), 400, param="user")
    assert_error(post("/admin/keys/nobody/ban", reason="x"), 404, code="not_found", param="key")
    assert_error(client.post(ban_path, data="reason=x", headers=ADMIN), 415)
    ban(client, "bob")
    assert_error(post("/admin/users/bob/unban", key="team-b"), 400, param="key")
    assert_error(client.get("/admin/users?key=x", headers=ADMIN), 400, param="key")
    assert len(client.get("/admin/users", headers=ADMIN).json["bans"]) == 1
    assert post("/admin/users/nobody/unban").json == {"lifted": []}


# Limits


def limited(cluster, settings=None, **table):
    return make_app(cluster, settings, table, CLOSED).test_client()


def remaining(client):
    """Tokens that are left, as any cheap answer tells it."""
    response = client.get("/v1/models", headers=bearer(KEY))
    return int(response.headers["x-ratelimit-remaining-tokens"])


def test_requests_per_minute(cluster):
    client = limited(cluster, key_limits={"requests_per_minute": 2})
    official = official_client(client.application, KEY)
    for left in ("1", "0"):
        raw = official.completions.with_raw_response.create(model=NAME, prompt="hi")
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == left
    encoded = cluster.tok.encoded
    with pytest.raises(openai.RateLimitError) as refused:
        official.completions.create(model=NAME, prompt="hi")
    assert (refused.value.code, refused.value.type) == ("requests", "rate_limit_exceeded")
    headers = refused.value.response.headers
    assert 1 <= int(headers["retry-after"]) <= 61
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert cluster.tok.encoded == encoded
    assert complete(client, bearer(OTHER_KEY)).status_code == 200


def test_tokenising_counts_as_a_request(cluster):
    """Without limit a key could have the server tokenise for it."""
    table = {"key_limits": {"requests_per_minute": 3}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()

    def ask(path, **body):
        return client.post(path, json=body, headers=bearer(KEY))

    assert ask("/tokenize", prompt="hi").headers["x-ratelimit-remaining-requests"] == "2"
    assert ask("/detokenize", tokens=[1]).headers["x-ratelimit-remaining-requests"] == "1"
    assert complete(client, bearer(KEY)).status_code == 200
    encoded = cluster.tok.encoded
    for response in (ask("/tokenize", prompt="hi"), ask("/detokenize", tokens=[1])):
        assert_error(response, 429, "rate_limit_exceeded", "requests")
    assert cluster.tok.encoded == encoded


def test_tokenising_is_no_burst(cluster):
    """An evaluation harness sends hundreds of texts in seconds, and would have to pause."""
    table = {"bursts": {"requests": 2, "strikes": 1}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()
    for _ in range(6):
        body = {"prompt": "hi"}
        assert client.post("/tokenize", json=body, headers=bearer(KEY)).status_code == 200
    assert complete(client, bearer(KEY)).status_code == 200


def test_limits_of_a_user(cluster):
    client = limited(cluster, user_limits={"requests_per_minute": 1})
    assert complete(client, bearer(KEY), user="u").status_code == 200
    assert_error(complete(client, bearer(KEY), user="u"), 429, "rate_limit_exceeded", "requests")
    assert complete(client, bearer(KEY), user="v").status_code == 200


def test_limits_are_told_on_every_answer_to_a_known_client(cluster):
    client = limited(cluster, key_limits={"requests_per_minute": 9, "tokens_per_minute": 90})
    for response in (
        client.get("/v1/models", headers=bearer(KEY)),
        client.get("/nope", headers=bearer(KEY)),
        complete(client, bearer(KEY), n=0),
        complete(client, bearer(KEY), stream=True),
    ):
        for kind in ("requests", "tokens"):
            for what in ("limit", "remaining", "reset"):
                assert f"x-ratelimit-{what}-{kind}" in response.headers


def test_tokens_are_reserved_and_the_unused_given_back(cluster):
    client = limited(cluster, key_limits={"tokens_per_minute": 200})
    headers = bearer(KEY)
    stream = client.post(
        "/v1/completions",
        json={"model": NAME, "prompt": "hi", "max_tokens": 50, "n": 3, "stream": True},
        headers=headers,
        buffered=False,
    )
    assert stream.headers["x-ratelimit-remaining-tokens"] == str(200 - 2 - 150)
    response = complete(client, headers, max_tokens=50)
    assert_error(response, 429, "rate_limit_exceeded", "tokens")
    assert "Retry-After" in response.headers
    assert len(cluster.handles) == 1
    stream.get_data()
    stream.close()
    assert remaining(client) == 200 - 2 - 3 * len("hello world")
    too_large = complete(client, headers, max_tokens=50, n=4)
    assert_error(too_large, 400, param="max_tokens")
    assert remaining(client) == 200 - 2 - 3 * len("hello world")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("batches", "used"), [(0, 0), (3, 2 + 3)])
def test_a_failure_costs_what_was_delivered(cluster, stream, batches, used):
    client = limited(cluster, key_limits={"tokens_per_minute": 200})
    cluster.script = fail_after(batches, cluster.script)
    complete(client, bearer(KEY), max_tokens=50, stream=stream).get_data()
    assert remaining(client) == 200 - used


def test_a_request_that_the_cluster_refuses_costs_no_tokens(cluster):
    client = limited(cluster, key_limits={"tokens_per_minute": 200})
    cluster.refusal = Unavailable("full")
    assert complete(client, bearer(KEY)).status_code == 503
    assert remaining(client) == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_pays_for_what_it_began(cluster, stream):
    good = cluster.script
    cluster.script = lambda request: good(request)[:4]  # and then nothing
    client = limited(cluster, key_limits={"tokens_per_minute": 200})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        client.post(
            "/v1/completions",
            json={"model": NAME, "prompt": "hi", "max_tokens": 50, "stream": stream},
            headers=bearer(KEY),
            environ_overrides={"gunicorn.socket": ours},
        ).get_data()
    (handle,) = cluster.handles
    assert handle.cancelled == [None]
    # It left before its first token, or after what was read.
    assert 200 - 2 - 4 <= remaining(client) <= 200 - 2


def test_blocked_content_leads_to_a_pause(cluster):
    table = {"content": {"terms": ["forbidden"], "strikes": 2, "cooldown_s": 60}}
    client = limited(cluster, **table)
    for _ in range(2):
        response = complete(client, bearer(KEY), prompt="a Forbidden word", user="u")
        assert_error(response, 400, code="content_blocked", param="prompt")
    response = complete(client, bearer(KEY), user="u")
    assert_error(response, 429, "rate_limit_exceeded", "requests")
    assert int(response.headers["Retry-After"]) > 50
    assert not cluster.handles
    ids = list(b"forbidden")  # as token ids it is the same text
    assert_error(
        complete(client, bearer(KEY), prompt=ids), 400, code="content_blocked", param="prompt"
    )


def test_refusals_are_strikes_of_whoever_sent_them(cluster):
    client = limited(cluster, refusals={"strikes": 3, "cooldown_s": 60})
    for _ in range(2):
        complete(client, bearer(KEY), user="u", max_tokens=10_000)
    (strike,) = client.get("/admin/users", headers=ADMIN).json["strikes"]
    assert (strike["key"], strike["user"], strike["rule"]) == ("team-a", "u", "refusals")
    assert len(strike["times"]) == 2
    complete(client, bearer(KEY), user="u", model="no")
    assert complete(client, bearer(KEY), user="u").status_code == 429
    assert complete(client, bearer(KEY), user="v").status_code == 200
    why = client.get("/admin/users/u/explain?key=team-a", headers=ADMIN).json
    assert "cooling down" in why["blocked"]


def test_metrics_count_decisions(client):
    complete(client, bearer(KEY))
    complete(client)
    ban(client, "bob")
    complete(client, bearer(KEY), user="bob")
    text = client.get("/metrics", headers=bearer(KEY)).get_data(as_text=True)
    for labels in (
        'code="",decision="admitted"',
        'code="invalid_api_key",decision="refused"',
        'code="user_banned",decision="refused"',
        'code="",decision="ban"',
    ):
        assert f"\nnanogpt_admission_total{{{labels}}} 1.0\n" in text
    assert "\nnanogpt_admission_redis_failures_total 0.0\n" in text


# The wait in the queue


def test_the_wait_for_the_first_token_has_an_end(cluster):
    cluster.script = lambda request: []
    table = {"key_limits": {"tokens_per_minute": 200}}
    client = limited(cluster, HttpConfig(queue_timeout_s=0.1), **table)
    response = complete(client, bearer(KEY))
    assert_error(response, 503, "server_error", "overloaded")
    assert int(response.headers["Retry-After"]) >= 1
    assert "0.1 s in the queue" in response.json["error"]["message"]
    streamed = complete(client, bearer(KEY), stream=True)
    assert streamed.status_code == 200
    last = streamed.get_data(as_text=True).strip().rpartition("\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "overloaded"
    assert [handle.cancelled for handle in cluster.handles] == [[None], [None]]
    assert remaining(client) == 200


def test_a_pause_between_tokens_is_no_wait_in_the_queue(cluster):
    cluster.delay_s = 0.08
    client = make_app(cluster, HttpConfig(queue_timeout_s=0.1)).test_client()
    assert complete(client, max_tokens=4).status_code == 200
