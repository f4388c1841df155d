"""Stored completions and Idempotency-Key over HTTP, on a fake cluster."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from nanogpt.jobs.store import StoreUnavailable
from nanogpt.jobs_config import JobsConfig
from nanogpt.request import GenerateRequest, TokenEvent
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
)
from tests.fake_cluster import INFO, FakeCluster, fail_after, play
from tests.jobs_utils import Others, jobs_app, wait_for

TEXT = "hello world"


@pytest.fixture
def cluster():
    return FakeCluster(play([TEXT.encode()]))


@pytest.fixture
def client(tmp_path, cluster):
    with jobs_app(tmp_path, cluster) as app:
        yield app.test_client()


def background(client, headers=None, **fields) -> dict:
    answer = complete(client, headers, background=True, **fields)
    assert answer.status_code == 202, answer.json
    assert answer.headers["Location"] == f"/v1/completions/{answer.json['id']}"
    return answer.json


def poll(client, completion_id, headers=None) -> dict:
    def ended():
        found = client.get(f"/v1/completions/{completion_id}", headers=headers).json
        return found if found["status"] not in ("queued", "in_progress") else None

    return wait_for(ended)


def stalled(batches: int):
    """A script that plays so many batches of a text, and then says nothing more."""
    script = play([TEXT.encode()])
    return lambda request: script(request)[:batches]


def chunks(answer) -> list:
    """The events, without comments; the last is what ended the stream."""
    parts = [p for p in answer.get_data(as_text=True).split("\n\n") if p and p[0] != ":"]
    return [p[6:] if p == "data: [DONE]" else json.loads(p[6:]) for p in parts]


# Background


def test_background_is_accepted_at_once_and_completed_later(client):
    accepted = background(client, max_tokens=5, metadata={"a": "b"}, n=2)
    assert accepted["status"] == "queued"
    assert (accepted["choices"], accepted["usage"], accepted["error"]) == ([], None, None)
    done = poll(client, accepted["id"])
    assert done["status"] == "completed"
    assert done["metadata"] == {"a": "b"}
    assert [c["text"] for c in done["choices"]] == ["hello"] * 2
    assert done["usage"]["completion_tokens"] == 10
    assert {k: done[k] for k in ("id", "created", "model", "background")} == {
        k: accepted[k] for k in ("id", "created", "model", "background")
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}, "background": True}, "metadata"),
        ({"metadata": {"k" * 65: ""}, "background": True}, "metadata"),
        ({"metadata": {"k": "v" * 513}, "background": True}, "metadata"),
        ({"metadata": {"k": 1}, "background": True}, "metadata"),
        ({"max_tokens": 1000, "background": True}, "max_tokens"),
    ],
)
def test_bad_ones_are_refused_before_they_are_stored(client, cluster, fields, param):
    answer = complete(client, **fields)
    assert answer.status_code == 400
    assert answer.json["error"]["param"] == param
    assert not cluster.handles


def test_without_jobs_background_is_refused(cluster):
    assert_error(
        complete(make_app(cluster).test_client(), background=True), 400, param="background"
    )


def test_it_goes_behind_those_who_wait(client, cluster):
    poll(client, background(client, priority=3)["id"])
    complete(client)
    assert [h.request.priority for h in cluster.handles] == [1_000_003, 0]


def test_a_failure_is_told(client, cluster):
    cluster.script = fail_after(1, play([TEXT.encode()]))
    done = poll(client, background(client)["id"])
    assert done["status"] == "failed"
    assert done["error"]["type"] == "server_error"
    assert "out of memory" in done["error"]["message"]
    ended = chunks(client.get(f"/v1/completions/{done['id']}?stream=true"))[-1]
    assert ended["error"] == done["error"]


def test_cancel_keeps_what_there_is_and_may_be_repeated(client, cluster):
    cluster.script = stalled(3)
    name = background(client, max_tokens=11)["id"]
    wait_for(lambda: cluster.handles)
    answer = client.post(f"/v1/completions/{name}/cancel")
    assert answer.status_code == 200
    done = poll(client, name)
    assert done["status"] == "cancelled"
    assert [c["text"] for c in done["choices"]] in ([], ["hel"])
    assert cluster.handles[0].left.is_set()
    assert client.post(f"/v1/completions/{name}/cancel").json == done
    assert chunks(client.get(f"/v1/completions/{name}?stream=true"))[-1]["error"]["code"] == (
        "cancelled"
    )


def test_delete_forgets_it_and_stops_it(client, cluster):
    cluster.script = stalled(1)
    name = background(client)["id"]
    wait_for(lambda: cluster.handles)
    answer = client.delete(f"/v1/completions/{name}")
    assert answer.json == {"id": name, "object": "text_completion", "deleted": True}
    assert_error(client.get(f"/v1/completions/{name}"), 404, code="not_found", param="id")
    assert_error(client.delete(f"/v1/completions/{name}"), 404, code="not_found", param="id")
    wait_for(cluster.handles[0].left.is_set)


def test_each_key_sees_its_own_and_an_admin_all(tmp_path, cluster):
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        client = app.test_client()
        name = background(client, bearer(KEY))["id"]
        path = f"/v1/completions/{name}"
        for method, route in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel")):
            assert client.open(route, method=method, headers=bearer(OTHER_KEY)).status_code == 404
        assert client.get(path, headers=bearer(KEY)).status_code == 200
        assert client.get(path, headers=bearer(ADMIN_KEY)).status_code == 200


def test_too_many_are_refused_with_503(tmp_path, cluster):
    cluster.script = stalled(1)
    with jobs_app(tmp_path, cluster, JobsConfig(max_queued=2)) as app:
        client = app.test_client()
        background(client)
        background(client)
        answer = complete(client, background=True)
        assert_error(answer, 503, kind="server_error", code="overloaded")
        assert answer.headers["Retry-After"]


def test_a_full_disk_is_a_503_and_nothing_is_kept(client, cluster, monkeypatch):
    store = client.application.extensions["nanogpt"].companion._store

    def full(job):
        raise StoreUnavailable("the disk is full: nothing was accepted")

    monkeypatch.setattr(store, "put", full)
    answer = complete(client, background=True)
    assert_error(answer, 503, kind="server_error", code="overloaded")
    assert "disk is full" in answer.json["error"]["message"]
    assert complete(client).status_code == 200
    monkeypatch.undo()
    assert poll(client, background(client)["id"])["status"] == "completed"


def test_tokens_that_the_disk_does_not_take_are_kept_when_there_is_room(
    client, cluster, monkeypatch
):
    store = client.application.extensions["nanogpt"].companion._store
    monkeypatch.setattr("nanogpt.api.jobs.execute.RETRY_S", 0.01)
    monkeypatch.setattr("nanogpt.jobs.runner.RETRY_S", 0.01)
    real, failures = store.complete, []

    def full(*args, **kwargs):
        if len(failures) < 3:
            failures.append(1)
            raise StoreUnavailable("the disk is full")
        return real(*args, **kwargs)

    monkeypatch.setattr(store, "complete", full)
    done = poll(client, background(client, max_tokens=11)["id"])
    assert (done["status"], done["choices"][0]["text"], len(failures)) == ("completed", TEXT, 3)


# Streams of stored completions


def test_its_stream_is_replayed_from_any_event_on(client):
    name = background(client, max_tokens=11, n=2)["id"]
    poll(client, name)
    every = chunks(client.get(f"/v1/completions/{name}?stream=true"))
    assert every[-1] == "[DONE]"
    assert [c["sequence_number"] for c in every[:-1]] == list(range(len(every) - 1))
    texts = {0: "", 1: ""}
    for chunk in every[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: TEXT, 1: TEXT}
    for after in range(len(every)):
        got = chunks(client.get(f"/v1/completions/{name}?stream=true&starting_after={after}"))
        assert got == every[after + 1 :] or (after == len(every) - 1 and got == ["[DONE]"])


def test_background_with_stream_is_its_stream(client):
    answer = complete(client, background=True, stream=True, max_tokens=11)
    assert answer.status_code == 200
    every = chunks(answer)
    name = every[0]["id"]
    assert answer.headers["Location"] == f"/v1/completions/{name}"
    assert chunks(client.get(f"/v1/completions/{name}?stream=true")) == every


def test_usage_is_numbered_too(client):
    answer = complete(
        client, background=True, stream=True, max_tokens=3, stream_options={"include_usage": True}
    )
    *_, usage, done = chunks(answer)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert done == "[DONE]"
    again = client.get(
        f"/v1/completions/{usage['id']}?stream=true&starting_after={usage['sequence_number'] - 1}"
    )
    assert chunks(again) == [usage, done]


def test_a_dropped_follower_leaves_it_running(client, cluster):
    gate = threading.Event()
    script = play([TEXT.encode()])

    def slow(request):
        batches = script(request)
        return [*batches[:2], *([] if not gate.is_set() else batches[2:])]

    cluster.script = slow
    answer = complete(client, background=True, stream=True, max_tokens=11)
    body = answer.iter_encoded()
    first = next(part for part in body if part.startswith(b"data"))
    answer.close()
    assert not cluster.handles[0].left.is_set()
    name = json.loads(first.split(b"\n\n")[0][6:])["id"]
    assert client.get(f"/v1/completions/{name}").json["status"] == "in_progress"


@pytest.mark.parametrize("query", ["stream=yes", "starting_after=1", "x=1"])
@pytest.mark.parametrize("extra", ["", "&stream=true&starting_after=-1"])
def test_bad_queries(client, query, extra):
    name = background(client)["id"]
    assert client.get(f"/v1/completions/{name}?{query}{extra}").status_code == 400


# A server that ends in the middle


def resuming(request: GenerateRequest):
    """The text from where it was, as the engines do it."""
    batches = []
    for batch in play([TEXT.encode()])(request):
        for event in batch:
            assert isinstance(event, TokenEvent)
            if event.index in request.finished:
                continue
            known = len(request.resumed[event.index]) if request.resumed else 0
            if event.position >= known:
                batches.append([event])
    return batches


def test_the_next_server_goes_on_from_the_tokens_so_far(tmp_path):
    first = FakeCluster(stalled(4))
    with jobs_app(tmp_path, first) as app:
        name = background(app.test_client(), max_tokens=11, n=2)["id"]
        follower = f"/v1/completions/{name}?stream=true"
        client = app.test_client()
        answer = client.get(follower)
        seen = b""
        for part in answer.iter_encoded():
            seen += part
            if seen.count(b"data: ") == 2:  # something of both choices was kept
                break
        answer.close()
    second = FakeCluster(resuming)
    with jobs_app(tmp_path, second) as app:
        client = app.test_client()
        done = poll(client, name)
        assert [c["text"] for c in done["choices"]] == [TEXT] * 2
        request, before = second.handles[0].request, first.handles[0].request
        assert request.params.seed == before.params.seed
        assert all(TEXT.encode().startswith(bytes(tokens)) for tokens in request.resumed)
        assert sum(map(len, request.resumed)) >= 2
        whole = client.get(follower).get_data()
        assert whole.startswith(seen.replace(b": ping\n\n", b""))


def test_what_was_never_begun_is_begun_by_the_next_server(tmp_path, cluster):
    first = FakeCluster()
    first.state = first.state._replace(ready=False)
    with jobs_app(tmp_path, first) as app:
        name = background(app.test_client(), max_tokens=11)["id"]
    assert not first.handles
    with jobs_app(tmp_path, cluster) as app:
        assert poll(app.test_client(), name)["choices"][0]["text"] == TEXT


def test_other_weights_are_a_new_plan_before_the_first_token_and_the_end_after_it(tmp_path):
    first = FakeCluster(stalled(2))
    with jobs_app(tmp_path, first) as app:
        client = app.test_client()
        begun = background(client, max_tokens=11)["id"]
        store = app.extensions["nanogpt"].companion._store
        wait_for(lambda: store.read(begun, 0)[1])
    unready = FakeCluster()
    unready.state = unready.state._replace(ready=False)
    with jobs_app(tmp_path, unready) as app:
        waiting = background(app.test_client(), max_tokens=11, seed=5)["id"]
    second = FakeCluster(play([TEXT.encode()]))
    second.infos = {NAME: msgspec.structs.replace(INFO, fingerprint="other")}
    with jobs_app(tmp_path, second) as app:
        client = app.test_client()
        done = poll(client, begun)
        assert done["status"] == "incomplete"
        assert TEXT.startswith(done["choices"][0]["text"])
        assert "replaced" in done["error"]["message"]
        done = poll(client, waiting)
        assert (done["status"], done["id"]) == ("completed", waiting)
        assert done["system_fingerprint"].startswith("fp_other")
        assert second.handles[0].request.params.seed == 5


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_job_waits_for_the_cluster_that_has_its_model(tmp_path, monkeypatch, comes_back):
    """A cluster without the model failed it; now it goes back, until nobody has the model."""
    monkeypatch.setattr("nanogpt.jobs.runner.RETRY_S", 0.01)
    with jobs_app(tmp_path, FakeCluster(stalled(2))) as app:
        waiting = background(app.test_client())["id"]
    second, others = FakeCluster(resuming), Others(NAME)
    models = second.models
    second.models = lambda: {"another": msgspec.structs.replace(INFO, name="another")}
    with jobs_app(tmp_path, second, announcer=others) as app:
        client = app.test_client()
        wait_for(lambda: others.asked >= 3)
        assert client.get(f"/v1/completions/{waiting}").json["status"] != "failed"
        if comes_back:
            second.models = models
        else:
            others.offer = False
        done = poll(client, waiting)
        if comes_back:
            assert (done["status"], done["choices"][0]["text"]) == ("completed", TEXT)
        else:
            assert (done["status"], done["error"]["code"]) == ("failed", "model_not_found")
            assert not second.handles


def test_a_ban_ends_what_runs_in_the_background(tmp_path, monkeypatch):
    """It went on to its last token."""
    monkeypatch.setattr("nanogpt.api.exchange.POLL_S", 0.01)
    cluster = FakeCluster(stalled(4))
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        client = app.test_client()
        mine = [background(client, bearer(KEY), user=user)["id"] for user in ("mallory", "bob")]
        wait_for(lambda: len(cluster.handles) == 2)
        wait_for(lambda: all(handle.is_played for handle in cluster.handles))
        path, admin = "/admin/users/mallory/ban", bearer(ADMIN_KEY)
        assert client.post(path, json={"reason": "spam"}, headers=admin).status_code == 200
        done = poll(client, mine[0], bearer(KEY))
        assert (done["status"], done["error"]["code"]) == ("failed", "user_banned")
        assert done["choices"][0]["text"] == TEXT[:4]
        cancelled = {h.request.request_id.partition(".")[0]: h.cancelled for h in cluster.handles}
        assert cancelled[mine[0]]
        other = client.get(f"/v1/completions/{mine[1]}", headers=bearer(KEY)).json
        assert other["status"] == "in_progress"


def test_what_waited_for_its_turn_when_its_user_was_banned_never_begins(tmp_path):
    with jobs_app(tmp_path, FakeCluster(stalled(0)), environ=CLOSED) as app:
        waiting = background(app.test_client(), bearer(KEY), user="mallory")["id"]
    cluster = FakeCluster(resuming)
    ready, cluster.ready = cluster.ready, lambda: False
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        client = app.test_client()
        path, admin = "/admin/users/mallory/ban", bearer(ADMIN_KEY)
        assert client.post(path, json={"reason": "spam"}, headers=admin).status_code == 200
        cluster.ready = ready
        assert poll(client, waiting, bearer(KEY))["error"]["code"] == "user_banned"
        assert not cluster.handles


# Idempotency-Key


def keyed(key="key-1", **more):
    return {"Idempotency-Key": key, **more}


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}])
def test_a_repeat_is_the_first_ones_answer(client, cluster, fields):
    first = complete(client, keyed(), max_tokens=11, **fields)
    again = complete(client, keyed(), max_tokens=11, **fields)
    assert (again.status_code, again.content_type) == (first.status_code, first.content_type)
    assert again.get_data() == first.get_data()
    name = first.headers.get("Location", "").rpartition("/")[2] or first.json["id"]
    poll(client, name)
    assert complete(client, keyed(), max_tokens=11, **fields).get_data() == first.get_data()
    assert len(cluster.handles) == 1


def test_the_answer_is_as_without_a_key(client):
    plain = complete(client, max_tokens=11, n=2).json
    under_key = complete(client, keyed(), max_tokens=11, n=2).json
    for field in ("choices", "usage", "object", "model", "system_fingerprint"):
        assert under_key[field] == plain[field]
    assert set(under_key) == set(plain)


def test_another_body_is_a_conflict(client):
    complete(client, keyed(), max_tokens=3)
    answer = complete(client, keyed(), max_tokens=4)
    assert_error(answer, 409, kind="conflict_error", param="Idempotency-Key")
    assert complete(client, keyed("key-2"), max_tokens=4).status_code == 200


@pytest.mark.parametrize("key", ["", " ", "a b", "é", "x" * 256])
def test_a_key_that_is_none_is_refused(client, key):
    assert_error(complete(client, keyed(key)), 400, param="Idempotency-Key")


@pytest.mark.parametrize(
    "path",
    [
        "/tokenize",
        "/detokenize",
        "/v1/completions/cmpl-1/cancel",
        "/v1/batches/batch_1/cancel",
        "/admin/users/bob/ban",
    ],
)
def test_a_key_that_would_not_be_heeded_is_refused(tmp_path, cluster, path):
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        headers = keyed(**bearer(ADMIN_KEY))
        answer = app.test_client().post(path, json={}, headers=headers)
        assert_error(answer, 400, param="Idempotency-Key")


def test_without_jobs_a_key_is_refused(cluster):
    answer = complete(make_app(cluster).test_client(), keyed())
    assert_error(answer, 400, param="Idempotency-Key")


def test_keys_of_two_callers_have_nothing_to_do_with_each_other(tmp_path, cluster):
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        client = app.test_client()
        one = complete(client, keyed(**bearer(KEY)), max_tokens=3)
        two = complete(client, keyed(**bearer(OTHER_KEY)), max_tokens=4)
        assert (one.status_code, two.status_code) == (200, 200)


def test_those_at_the_same_time_join(client, cluster):
    cluster.delay_s = 0.05

    def ask(_):
        return complete(client.application.test_client(), keyed(), max_tokens=11)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    assert {a.status_code for a in answers} == {200}
    assert len({a.get_data() for a in answers}) == 1
    assert len(cluster.handles) == 1


def test_a_failed_answer_is_repeated_too(client, cluster):
    cluster.script = fail_after(1, play([TEXT.encode()]))
    first = complete(client, keyed())
    assert_error(first, 500, kind="server_error")
    cluster.script = play([TEXT.encode()])
    assert complete(client, keyed()).get_data() == first.get_data()
    assert len(cluster.handles) == 1


def test_what_was_refused_is_not_remembered(client):
    assert complete(client, keyed(), max_tokens=1000).status_code == 400
    assert complete(client, keyed(), max_tokens=3).status_code == 200


def test_a_client_that_left_finds_its_answer_when_it_comes_back(tmp_path):
    """Also from the next server: the request goes on under its key."""
    first = FakeCluster(stalled(4))
    with jobs_app(tmp_path, first) as app:
        client = app.test_client()
        answer = complete(client, keyed(), stream=True, max_tokens=11)
        body = answer.iter_encoded()
        seen = next(part for part in body if part.startswith(b"data"))
        answer.close()
    second = FakeCluster(resuming)
    with jobs_app(tmp_path, second) as app:
        again = complete(app.test_client(), keyed(), stream=True, max_tokens=11).get_data()
    assert again.startswith(seen)
    assert "".join(json.loads(p[6:])["choices"][0]["text"] for p in parts(again)) == TEXT


def parts(body: bytes) -> list[str]:
    found = [p for p in body.decode().split("\n\n") if p.startswith("data: {")]
    assert body.endswith(b"data: [DONE]\n\n")
    return found


def test_tokens_are_reserved_once_and_given_back(tmp_path, cluster):
    table = {"key_limits": {"tokens_per_minute": 100}}
    with jobs_app(tmp_path, cluster, table=table, environ=CLOSED) as app:
        client = app.test_client()
        for _ in range(3):  # 2 of the prompt and up to 60
            answer = complete(client, keyed(**bearer(KEY)), max_tokens=60)
            assert answer.status_code == 200
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert left == 100 - 2 - len(TEXT)


def test_metrics_have_the_backlog(client, cluster):
    poll(client, background(client)["id"])
    text = client.get("/metrics").get_data(as_text=True)
    assert 'nanogpt_jobs{lane="background",status="completed"} 1.0' in text
    assert 'nanogpt_jobs_backlog{lane="background"} 0.0' in text
