"""A text of a job is of one model, whoever takes the job over: servers and clusters whose weights
differ from those that the job was accepted with, or was begun with."""

import json

import msgspec
import pytest

from nanogpt.api.jobs import relay
from nanogpt.api.jobs.relay import RelayExecutor, RelayHandle
from nanogpt.jobs import sqlite
from nanogpt.jobs.runner import Lease, PutBack
from nanogpt.jobs.sqlite import SqliteStore
from nanogpt.jobs.store import Lane
from nanogpt.request import GenerateRequest, PromptScored, RequestFailed, TokenEvent
from nanogpt.sampling_params import SamplingParams
from tests.app_utils import NAME, complete
from tests.fake_cluster import INFO, FakeCluster, logprobs_of
from tests.jobs_utils import jobs_app, wait_for
from tests.test_jobs_store import claim, job

LENGTH = 10


def cluster_of(letter: str, batches: int = LENGTH) -> FakeCluster:
    """One whose weights say nothing but this letter; it falls silent after so many tokens."""

    def script(request: GenerateRequest):
        known = len(request.resumed[0]) if request.resumed else 0
        found = []
        for at in range(known, LENGTH):
            reason = "length" if at == LENGTH - 1 else None
            token = TokenEvent(request.request_id, 0, at, (ord(letter),), (), reason, 0, None)
            found.append([token])
        return found[:batches]

    info = msgspec.structs.replace(INFO, fingerprint=f"of-{letter}")
    return FakeCluster(script, [info])


# What a web server asks of clusters


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(tmp_path, max_queued=10, max_bytes=10**9)
    yield store
    store.close()


def submit(store, **params) -> RelayHandle:
    sampling = SamplingParams(seed=1, max_tokens=LENGTH, **params)
    request = GenerateRequest(
        request_id="r", model=NAME, prompts=((1, 2),), n=1, params=sampling, priority=0
    )
    return relay.submit(store, request, 0.0)


@pytest.fixture
def handle(store):
    return submit(store)


def carry_out(store, cluster: FakeCluster, *, dies: bool) -> None:
    """Under a lease of its own; a cluster that dies does so once it has kept something."""
    job = store.claim(Lane.NOW, 30.0, 0.0)
    lease = Lease(store, job, lambda: dies and bool(store.read("r", 0)[1]))
    try:
        RelayExecutor(cluster)(lease)
    except PutBack:
        store.renew({"r": job.fence}, 0.0)


def answer(handle) -> tuple[str, RequestFailed | None]:
    text, failure = "", None
    while not handle._over:
        for event in handle.events(0.0):
            if isinstance(event, TokenEvent):
                text += bytes(event.token_ids).decode()
            elif isinstance(event, RequestFailed):
                failure = event
    return text, failure


@pytest.fixture(autouse=True)
def _dies_soon(monkeypatch):
    monkeypatch.setattr(relay, "LOOK_S", 0.02)


def test_a_cluster_goes_on_with_what_one_of_the_same_weights_began(store, handle):
    """It was failed when the web server had seen others: "replaced", though nothing was."""
    carry_out(store, cluster_of("b", 3), dies=True)
    carry_out(store, cluster_of("b"), dies=False)
    assert answer(handle) == ("b" * LENGTH, None)


def test_a_cluster_of_other_weights_does_not_go_on(store, handle):
    """It did, when its weights were those that the web server had seen."""
    carry_out(store, cluster_of("b", 3), dies=True)
    carry_out(store, cluster_of("a"), dies=False)
    text, failure = answer(handle)
    assert set(text) == {"b"}
    assert "replaced" in failure.message


def test_scores_of_a_prompt_are_of_the_same_model_as_its_text(store):
    handle = submit(store, logprobs=1, prompt_logprobs=True)
    scoring = cluster_of("b", 0)
    scored = PromptScored("r", 0, 1, (logprobs_of(2, 1),))
    scoring.script = lambda request: [[scored]]
    carry_out(store, scoring, dies=True)
    carry_out(store, cluster_of("a"), dies=False)
    text, failure = answer(handle)
    assert text == ""
    assert "replaced" in failure.message


# Stored completions


def accepted(directory, headers=None) -> dict:
    """By a server of the weights "a" that has not begun it when it ends."""
    cluster = cluster_of("a")
    cluster.state = cluster.state._replace(ready=False)
    with jobs_app(directory, cluster) as app:
        return ask(app, headers).json


def ask(app, headers=None):
    return complete(app.test_client(), headers, max_tokens=LENGTH, background=True)


def begun(directory, job_id: str, cluster: FakeCluster) -> None:
    with jobs_app(directory, cluster) as app:
        store = app.extensions["nanogpt"].companion._store
        wait_for(lambda: store.read(job_id, 0)[1])


def ended(directory, job_id: str, cluster: FakeCluster) -> tuple[dict, list[dict]]:
    """As it is then, and its events."""
    with jobs_app(directory, cluster) as app:
        client = app.test_client()
        url = f"/v1/completions/{job_id}"
        done = wait_for(
            lambda: (now := client.get(url).json)["status"] not in ("queued", "in_progress") and now
        )
        text = client.get(f"{url}?stream=true").get_data(as_text=True)
        parts = [part for part in text.split("\n\n") if part.startswith("data: {")]
        return done, [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_completion_goes_on_with_the_weights_that_began_it(tmp_path):
    """It was "incomplete" when others had accepted it."""
    name = accepted(tmp_path)["id"]
    begun(tmp_path, name, cluster_of("b", 3))
    done, events = ended(tmp_path, name, cluster_of("b"))
    assert (done["status"], done["choices"][0]["text"]) == ("completed", "b" * LENGTH)
    assert done["system_fingerprint"].startswith("fp_of-b")
    assert {event["system_fingerprint"] for event in events} == {done["system_fingerprint"]}


def test_a_completion_does_not_go_on_with_the_weights_that_accepted_it(tmp_path):
    """It did, and had text of two models."""
    name = accepted(tmp_path)["id"]
    begun(tmp_path, name, cluster_of("b", 3))
    done, events = ended(tmp_path, name, cluster_of("a"))
    assert done["status"] == "incomplete"
    assert set(done["choices"][0]["text"]) == {"b"}
    assert "replaced" in done["error"]["message"]
    assert done["system_fingerprint"].startswith("fp_of-b")
    assert events[0]["system_fingerprint"] == done["system_fingerprint"]


def test_a_completion_that_was_planned_anew_is_done_at_once_and_its_repeat_is_the_same(tmp_path):
    """Nothing was kept of it before its end; and it was accepted as it was accepted."""
    key = {"Idempotency-Key": "k"}
    first = accepted(tmp_path, key)
    cluster = cluster_of("b")
    whole = cluster.script
    cluster.script = lambda request: [[e for batch in whole(request) for e in batch]]
    done, events = ended(tmp_path, first["id"], cluster)
    assert done["status"] == "completed"
    assert events[0]["system_fingerprint"] == done["system_fingerprint"]
    with jobs_app(tmp_path, cluster) as app:
        assert ask(app, key).json == first


def test_a_job_and_its_records_are_read_as_of_one_moment(store, monkeypatch):
    """Who follows would take records for those of the plan that they replaced."""
    store.put(job("j"))
    fence = claim(store).fence
    read = sqlite._one

    def write_in_between(*arguments):
        found = read(*arguments)
        monkeypatch.undo()
        store.append("j", fence, [b"record"], b"state")
        return found

    monkeypatch.setattr(sqlite, "_one", write_in_between)
    found, records = store.read("j", 0)
    assert (found.state, records) == (b"", [])
    found, records = store.read("j", 0)
    assert (found.state, records) == (b"state", [b"record"])
