"""Files and batches over HTTP, on a fake cluster, with the official client where it can say it."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time

import msgspec
import openai
import pytest

from nanogpt.api.admission import Admission
from nanogpt.api.jobs.batch_feed import FIRST_PAUSE_S, Gate
from nanogpt.config import HttpConfig
from nanogpt.errors import Unauthorized, Unavailable
from nanogpt.jobs import batches
from nanogpt.jobs_config import JobsConfig
from nanogpt.request import RequestFailed
from tests.app_utils import (
    ADMIN_KEY,
    CLOSED,
    KEY,
    NAME,
    OTHER_KEY,
    assert_error,
    bearer,
    official_client,
)
from tests.fake_cluster import INFO, FakeCluster, play
from tests.jobs_utils import Others, jobs_app, wait_for
from tests.server import ROOT


@pytest.fixture
def cluster():
    return FakeCluster()


@pytest.fixture
def app(tmp_path, cluster):
    with jobs_app(tmp_path, cluster) as app:
        yield app


@pytest.fixture
def client(app):
    return official_client(app, "none")


def line(i: int, **body) -> dict:
    fields = {"model": NAME, "prompt": f"hi {i}", "max_tokens": 3, **body}
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": fields}


def jsonl(lines) -> bytes:
    return b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)


def begin_batch(client, lines, **more):
    """Its lines, or the content of its file."""
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", **more
    )


def run_batch(client, content: bytes, **more):
    return finished(client, begin_batch(client, content, **more).id)


def finished(client, batch_id):
    def ended():
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "cancelled", "expired") else None

    return wait_for(ended)


def lines_of(client, file_id) -> dict[str, dict]:
    if file_id is None:
        return {}
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert len({x["custom_id"] for x in found}) == len(found)
    return {x["custom_id"]: x for x in found}


# Files


def test_a_file_is_kept_as_it_was_sent(client, tmp_path):
    content = os.urandom(3_000_000)
    file = client.files.create(file=("any name é.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "any name é.jsonl", "batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert list((tmp_path / "files").iterdir()) == []


def test_files_are_listed_in_pages(client):
    ids = [client.files.create(file=(f"{i}", b"x"), purpose="batch").id for i in range(5)]
    assert [f.id for f in client.files.list(limit=2)] == ids[::-1]  # the client asks for more
    assert [f.id for f in client.files.list(limit=2).data] == ids[:2:-1]
    assert [f.id for f in client.files.list(order="asc", after=ids[1]).data] == ids[2:]
    assert client.files.list(purpose="batch_output").data == []
    for bad in ({"limit": 0}, {"limit": 10_001}, {"order": "x"}):
        with pytest.raises(openai.BadRequestError):
            client.files.list(**bad)
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")


@pytest.mark.parametrize(
    ("form", "status", "param"),
    [
        ({"purpose": "batch"}, 400, "file"),
        ({"purpose": "fine-tune", "file": b"x"}, 400, "purpose"),
        ({"file": b"x"}, 400, "purpose"),
        ({"purpose": "batch", "file": b"x", "other": "1"}, 400, "other"),
        (
            {"purpose": "batch", "file": b"x", "expires_after[seconds]": "5000"},
            400,
            "expires_after",
        ),
        (
            {
                "purpose": "batch",
                "file": b"x",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "1",
            },
            400,
            "expires_after",
        ),
    ],
)
def test_bad_uploads_leave_nothing(tmp_path, form, status, param):
    fields = {
        k: (io.BytesIO(v), "in.jsonl") if isinstance(v, bytes) else v for k, v in form.items()
    }
    with jobs_app(tmp_path, config=JobsConfig(max_file_mb=1)) as app:
        client = app.test_client()
        answer = client.post("/v1/files", data=fields, content_type="multipart/form-data")
        assert_error(answer, status, param=param)
        assert list((tmp_path / "files").iterdir()) == []
        assert client.get("/v1/files").json["data"] == []


@pytest.mark.parametrize("size", [1_000_001, 2_000_001])
def test_a_file_that_is_too_large_is_refused(tmp_path, size):
    with jobs_app(tmp_path, config=JobsConfig(max_file_mb=1)) as app:
        client = official_client(app, "none")
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("a", bytes(size)), purpose="batch")
        assert refused.value.status_code == 413
        assert client.files.create(file=("a", bytes(1_000_000)), purpose="batch").bytes == 10**6
        assert len(list((tmp_path / "files").iterdir())) == 1


def test_an_upload_that_is_cut_off_or_no_form_leaves_nothing(app, tmp_path):
    client = app.test_client()
    kind = "multipart/form-data; boundary=B"
    cut = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf a fi'
    assert client.post("/v1/files", data=cut, content_type=kind).status_code == 400
    assert client.post("/v1/files", data=b"{}", content_type="application/json").status_code == 415
    no_boundary = client.post("/v1/files", data=b"x", content_type="multipart/form-data")
    assert no_boundary.status_code == 400
    assert list((tmp_path / "files").iterdir()) == []


def test_expiry_of_a_file_may_be_chosen(client):
    file = client.files.create(
        file=("a", b"x"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at - file.created_at == 3600


def test_what_expires_is_forgotten_with_its_content(tmp_path):
    now = time.time()
    with jobs_app(tmp_path, config=JobsConfig(keep_hours=1.0)) as app:
        client = official_client(app, "none")
        file = client.files.create(file=("a", b"x"), purpose="batch")
        companion = app.extensions["nanogpt"].companion
        companion._store._clock = lambda: now + 3700
        companion._contents.forget(companion._store.sweep())
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        assert list((tmp_path / "files").iterdir()) == []


def test_a_repeated_upload_is_the_first_one(client):
    header = {"Idempotency-Key": "up"}

    def upload(content):
        return client.files.create(file=("a", content), purpose="batch", extra_headers=header)

    first = upload(b"one")
    assert upload(b"one") == first
    assert [f.id for f in client.files.list()] == [first.id]
    with pytest.raises(openai.ConflictError):
        upload(b"two")
    assert client.files.content(first.id).content == b"one"


def test_a_full_disk_is_a_503_and_leaves_nothing(app, client, tmp_path, monkeypatch):
    real = os.fsync

    def full(fd):
        if "files" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr("nanogpt.jobs.files.os.fsync", full)
    with pytest.raises(openai.InternalServerError) as refused:
        client.files.create(file=("a", b"x"), purpose="batch")
    assert refused.value.status_code == 503
    assert "No space left" in refused.value.message
    monkeypatch.undo()
    assert list((tmp_path / "files").iterdir()) == []
    assert client.files.list().data == []


def test_content_that_nobody_knows_is_removed_at_the_start(tmp_path):
    with jobs_app(tmp_path) as app:
        client = official_client(app, "none")
        kept = client.files.create(file=("a", b"x"), purpose="batch").id
    (tmp_path / "files" / "file-orphan").write_text("x")
    (tmp_path / "files" / "half.partial").write_text("x")
    with jobs_app(tmp_path):
        assert [p.name for p in (tmp_path / "files").iterdir()] == [kept]


def test_each_key_has_its_own(tmp_path, cluster):
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        mine, other, admin = (official_client(app, k) for k in (KEY, OTHER_KEY, ADMIN_KEY))
        done = run_batch(mine, jsonl([line(0)]))
        assert other.files.list().data == other.batches.list().data == []
        assert len(admin.files.list().data) == 2
        assert admin.batches.retrieve(done.id) == done
        for call, name in (
            (other.files.content, done.output_file_id),
            (other.files.delete, done.input_file_id),
            (other.batches.retrieve, done.id),
            (other.batches.cancel, done.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call(name)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(
                input_file_id=done.input_file_id,
                endpoint="/v1/completions",
                completion_window="24h",
            )
        assert len(lines_of(mine, done.output_file_id)) == 1


# Batches


def test_lines_have_one_result_each(client, cluster):
    lines = [line(i, n=2) for i in range(30)]
    lines[4]["body"]["bogus"] = 1
    lines[5]["body"]["background"] = True
    done = run_batch(client, jsonl(lines) + b"\n\n", metadata={"a": "b"})
    assert (done.status, done.metadata) == ("completed", {"a": "b"})
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (30, 28, 2)
    output, errors = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    assert set(errors) == {"r4", "r5"}
    assert errors["r4"]["response"]["body"]["error"]["param"] == "bogus"
    assert errors["r4"]["error"] is None
    assert len(output["r0"]["response"]["body"]["choices"]) == 2
    assert output["r0"]["response"]["status_code"] == 200
    assert {h.request.priority for h in cluster.handles} == {2_000_000}


@pytest.mark.parametrize(
    ("lines", "errors"),
    [
        ([b"{"], [("invalid_json_line", 1)]),
        ([line(0), b"\xff", line(1)], [("invalid_json_line", 2)]),
        ([line(0), b"", b"[]"], [("invalid_request", 3)]),
        ([line(0), line(1), line(0)], [("duplicate_custom_id", 3)]),
        ([{**line(0), "url": "/v1/chat/completions"}], [("invalid_url", 1)]),
        (
            [{**line(0), "method": "GET"}, line(1), b"x"],
            [("invalid_method", 1), ("invalid_json_line", 3)],
        ),
        ([{**line(0), "body": 5}], [("invalid_request", 1)]),
        ([{**line(0), "more": 5}], [("invalid_request", 1)]),
        ([{"custom_id": "a"}], [("invalid_request", 1)]),
        ([{**line(0), "body": {"prompt": "x" * 2**20}}], [("line_too_long", 1)]),
        ([b""], [("empty_file", None)]),
    ],
)
def test_a_broken_file_fails_with_its_lines(tmp_path, cluster, lines, errors):
    with jobs_app(tmp_path, cluster, settings=HttpConfig(max_body_mib=1)) as app:
        client = official_client(app, "none")
        done = run_batch(client, jsonl(lines))
        assert done.status == "failed"
        assert [(e.code, e.line) for e in done.errors.data] == errors
        assert all(e.message for e in done.errors.data)
        assert (done.output_file_id, done.error_file_id) == (None, None)
        assert not cluster.handles


def test_too_many_lines(client, monkeypatch):
    monkeypatch.setattr("nanogpt.jobs.batches.MAX_LINES", 5)
    done = run_batch(client, jsonl([line(i) for i in range(6)]))
    assert [e.code for e in done.errors.data] == ["too_many_lines"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"input_file_id": "file-none"}, openai.NotFoundError),
        ({"endpoint": "/v1/embeddings"}, openai.BadRequestError),
        ({"completion_window": "1h"}, openai.BadRequestError),
        ({"metadata": {"k": "v" * 513}}, openai.BadRequestError),
        ({"extra_body": {"bogus": 1}}, openai.BadRequestError),
    ],
)
def test_bad_batches_are_refused(client, fields, error):
    file = client.files.create(file=("a", jsonl([line(0)])), purpose="batch")
    good = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file.id}
    with pytest.raises(error):
        client.batches.create(**{**good, **fields})
    assert client.batches.list().data == []


def test_output_is_no_input(client):
    done = run_batch(client, jsonl([line(0)]))
    with pytest.raises(openai.BadRequestError):
        client.batches.create(
            input_file_id=done.output_file_id,
            endpoint="/v1/completions",
            completion_window="24h",
        )


def test_a_repeated_batch_is_the_first_one(client):
    file = client.files.create(file=("a", jsonl([line(0)])), purpose="batch")

    def create(window="24h", **more):
        return client.batches.with_raw_response.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window=window,
            extra_headers={"Idempotency-Key": "b"},
            **more,
        )

    first = create()
    finished(client, first.parse().id)
    assert create().content == first.content
    with pytest.raises(openai.ConflictError):
        create(metadata={"other": "body"})
    assert len(client.batches.list().data) == 1


def test_a_missing_input_fails_the_batch(client, tmp_path):
    """As when it was deleted before the batch began."""
    file = client.files.create(file=("a", jsonl([line(0)])), purpose="batch")
    (tmp_path / "files" / file.id).unlink()
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    done = finished(client, batch.id)
    assert (done.status, [e.code for e in done.errors.data]) == ("failed", ["input_file_gone"])


def silent_after(count: int, cluster: FakeCluster):
    """The first `count` lines are answered, the others never."""
    script = play([b"hello"])
    return lambda request: script(request) if len(cluster.handles) < count else []


def test_cancel_reports_every_line(client, cluster):
    cluster.script = silent_after(3, cluster)
    batch = begin_batch(client, [line(i) for i in range(10)])
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == 3)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = finished(client, batch.id)
    assert done.status == "cancelled"
    assert done.cancelled_at >= done.cancelling_at >= done.in_progress_at
    output, errors = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    assert (len(output), len(errors)) == (3, 7)
    assert {e["error"]["code"] for e in errors.values()} == {"batch_cancelled"}
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (10, 3, 7)


def test_a_batch_whose_time_is_up_has_expired(client, cluster, monkeypatch):
    monkeypatch.setattr("nanogpt.api.jobs.batches.WINDOW_S", 2.0)
    cluster.script = silent_after(1, cluster)
    done = run_batch(client, jsonl([line(i) for i in range(4)]))
    assert (done.status, done.expired_at is not None) == ("expired", True)
    errors = lines_of(client, done.error_file_id)
    assert {e["error"]["code"] for e in errors.values()} == {"batch_expired"}
    assert len(lines_of(client, done.output_file_id)) == 1


def test_lines_that_are_done_are_not_run_again(tmp_path):
    first = FakeCluster()
    first.script = silent_after(4, first)
    with jobs_app(tmp_path, first) as app:
        client = official_client(app, "none")
        batch = begin_batch(client, [line(i) for i in range(10)])
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == 4)
    second = FakeCluster(play([b"hello"]))
    with jobs_app(tmp_path, second) as app:
        client = official_client(app, "none")
        done = finished(client, batch.id)
        assert done.request_counts.completed == 10
        assert len(lines_of(client, done.output_file_id)) == 10
        assert len(second.handles) == 6
        seeds = {h.request.prompts: h.request.params.seed for h in first.handles[4:]}
        assert {h.request.prompts: h.request.params.seed for h in second.handles} == seeds


def test_choices_of_all_lines_stay_within_the_room(tmp_path, cluster):
    cluster.script = lambda request: []
    with jobs_app(tmp_path, cluster, JobsConfig(max_batch_choices=8)) as app:
        client = official_client(app, "none")
        batch = begin_batch(client, [line(i, n=3) for i in range(10)])
        wait_for(lambda: len(cluster.handles) == 2)
        assert client.batches.cancel(batch.id)
        finished(client, batch.id)
        assert len(cluster.handles) == 2


def test_lines_are_under_the_content_rules_and_the_keys_models_but_no_limit(tmp_path, cluster):
    table = {
        "content": {"terms": ["forbidden"], "strikes": 0},
        "key_limits": {"tokens_per_minute": 5, "requests_per_minute": 50},
        "keys": {"team-b": {"models": ["other"]}},
    }
    with jobs_app(tmp_path, cluster, table=table, environ=CLOSED) as app:
        client = official_client(app, KEY)
        lines = [line(0), line(1, prompt="a forbidden word"), *map(line, range(2, 9))]
        done = run_batch(client, jsonl(lines))
        assert set(lines_of(client, done.error_file_id)) == {"r1"}
        assert len(lines_of(client, done.output_file_id)) == 8
        other = official_client(app, OTHER_KEY)
        done = run_batch(other, jsonl([line(0)]))
        found = lines_of(other, done.error_file_id)["r0"]
        assert found["response"]["status_code"] == 404


def test_a_ban_ends_the_lines_of_its_user_and_no_others(tmp_path, cluster, monkeypatch):
    """Those that run, and those that have not begun."""
    monkeypatch.setattr("nanogpt.api.jobs.batch_feed.LOOK_S", 0.01)
    answer = play([b"hello"])
    is_banned = threading.Event()
    cluster.script = lambda request: answer(request) if is_banned.is_set() else []
    settings = JobsConfig(max_batch_choices=2)
    with jobs_app(tmp_path, cluster, settings, environ=CLOSED) as app:
        client = official_client(app, KEY)
        lines = [line(i, user="bob" if i == 1 else "mallory") for i in range(4)]
        batch = begin_batch(client, lines)
        wait_for(lambda: len(cluster.handles) == 2)
        is_banned.set()
        ban = app.test_client().post(
            "/admin/users/mallory/ban", json={"reason": "spam"}, headers=bearer(ADMIN_KEY)
        )
        assert ban.status_code == 200
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.failed == 3)
        assert [h.cancelled for h in cluster.handles] == [[None], []]  # all of it, nothing
        client.batches.cancel(batch.id)  # bob's line has no end
        done = finished(client, batch.id)
        errors = lines_of(client, done.error_file_id)
        banned = {name: errors[name]["response"] for name in ("r0", "r2", "r3")}
        assert {r["status_code"] for r in banned.values()} == {403}
        assert {r["body"]["error"]["code"] for r in banned.values()} == {"user_banned"}
        assert errors["r1"]["error"]["code"] == "batch_cancelled"


@pytest.mark.parametrize("comes_back", [True, False])
def test_lines_for_another_clusters_model_are_left_to_it(tmp_path, monkeypatch, comes_back):
    """All others are done at once; and when nobody has the model any more, the lines fail."""
    monkeypatch.setattr("nanogpt.jobs.runner.RETRY_S", 0.01)
    cluster, others = FakeCluster(play([b"hello"])), Others("another")
    with jobs_app(tmp_path, cluster, announcer=others) as app:
        client = official_client(app, "none")
        lines = [line(i, model=("another", NAME)[i % 2]) for i in range(6)]
        batch = begin_batch(client, lines)
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed == 3)
        wait_for(lambda: others.asked >= 7)  # it goes back and comes again
        assert client.batches.retrieve(batch.id).status == "in_progress"
        assert len(cluster.handles) == 3
        if comes_back:
            cluster.infos["another"] = msgspec.structs.replace(INFO, name="another")
        else:
            others.offer = False
        done = finished(client, batch.id)
        output, errors = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
        assert {"r1", "r3", "r5"} <= set(output)
        assert len(output) == (6 if comes_back else 3)
        assert {e["response"]["status_code"] for e in errors.values()} <= {404}
        assert len(output) + len(errors) == 6


@pytest.fixture
def quick_gate(monkeypatch):
    monkeypatch.setattr("nanogpt.api.jobs.batch_feed.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("nanogpt.api.jobs.batch_feed.LONGEST_PAUSE_S", 0.02)


def test_lines_wait_while_there_is_no_room_for_their_model(client, cluster, quick_gate):
    """A pinned model made them fail, all that were left."""
    answer = play([b"hello"])

    def script(request):
        if len(cluster.handles) < 5:
            return [[RequestFailed(request.request_id, "no room", "no_room", 10)]]
        return answer(request)

    cluster.script = script
    done = run_batch(client, jsonl([line(i) for i in range(4)]))
    assert (done.request_counts.completed, done.request_counts.failed) == (4, 0)
    bodies = [x["response"]["body"] for x in lines_of(client, done.output_file_id).values()]
    assert {body["choices"][0]["text"] for body in bodies} == {"hel"}


def test_only_one_line_asks_whether_a_cluster_is_back(tmp_path, cluster, quick_gate):
    """And all of them are let in, and counted as such, once."""
    asked, audit = [], tmp_path / "audit"
    submit = cluster.submit

    def count(request, **options):
        asked.append(request.request_id)
        return submit(request, **options)

    cluster.submit = count
    cluster.refusal = Unavailable("being loaded", code="starting")
    with jobs_app(tmp_path, cluster, table={"audit_file": str(audit)}) as app:
        client = official_client(app, "none")
        batch = begin_batch(client, [line(i) for i in range(20)])
        wait_for(lambda: len(asked) >= 3)
        assert len(set(asked)) < 5
        cluster.refusal = None
        done = finished(client, batch.id)
        assert done.request_counts.completed == 20
    entries = [json.loads(text) for text in audit.read_text().splitlines()]
    assert len([entry for entry in entries if entry["decision"] == "admitted"]) == 20


def test_lines_of_a_key_that_is_gone_are_refused_and_the_others_kept(
    tmp_path, cluster, monkeypatch
):
    is_gone = threading.Event()
    named = Admission.named

    def find(admission, name):
        if is_gone.is_set():
            raise Unauthorized("that key is no longer valid")
        return named(admission, name)

    monkeypatch.setattr(Admission, "named", find)
    with jobs_app(tmp_path, cluster, environ=CLOSED) as app:
        client = official_client(app, KEY)
        answer = play([b"hello"])

        def script(request):
            if len(cluster.handles) == 2:
                is_gone.set()
            return answer(request)

        cluster.script = script
        done = run_batch(client, jsonl([line(i) for i in range(5)]))
        assert (done.request_counts.completed, done.request_counts.failed) == (3, 2)
        errors = lines_of(client, done.error_file_id)
        assert {x["response"]["status_code"] for x in errors.values()} == {401}


def test_a_gate_lets_one_through_until_that_one_has_a_token(monkeypatch):
    now = 100.0
    monkeypatch.setattr("nanogpt.api.jobs.batch_feed.time.monotonic", lambda: now)
    gate = Gate()
    assert gate.lets(1)
    assert gate.lets(2)
    gate.shut()
    gate.shut()  # 2 fails as well
    assert not gate.lets(1)
    now += FIRST_PAUSE_S
    assert gate.lets(2)
    assert not gate.lets(1)
    gate.shut()
    now += FIRST_PAUSE_S
    assert not gate.lets(1)
    now += FIRST_PAUSE_S
    assert gate.lets(1)
    gate.forget(1)  # cancelled
    assert gate.lets(3)
    gate.open()
    assert gate.lets(1)
    assert gate.lets(2)
    gate.shut()
    assert not gate.lets(1)


def test_many_lines_are_never_in_memory_together(tmp_path):
    """A process that may not hold the input file validates it."""
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for i in range(50_000):
            file.write(jsonl([line(i, prompt="x" * 3000)]) + b"\n")
    assert path.stat().st_size > 150_000_000
    code = (
        "import resource\n"
        "from nanogpt.jobs.batches import Validation, numbered_lines\n"
        "check = Validation(2**20)\n"
        f"with open({str(path)!r}, 'rb') as file:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    for number, text in numbered_lines(file, 2**20):\n"
        "        check.add(number, text)\n"
        "assert check.finish() == [] and check.total == 50_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 50_000, done.stderr  # KiB; the file has three times as much


def test_long_lines_are_cut_and_counted_once():
    text = b"a" * 10 + b"\n" + b"b" * 35 + b"\n\n" + b"c"
    found = list(batches.numbered_lines(io.BytesIO(text), 10))
    assert [(n, len(t)) for n, t in found] == [(1, 11), (2, 11), (4, 1)]
