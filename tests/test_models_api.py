"""GET /v1/models, and what is said of a model that is known but not served."""

import subprocess
import sys

import msgspec
import pytest

from nanogpt.config import PROJECT
from nanogpt.registry import read_cards
from nanogpt.request import RequestFailed
from tests.app_utils import ADMIN_KEY, CLOSED, KEY, assert_error, bearer, complete, make_app
from tests.fake_cluster import INFO, FakeCluster


@pytest.fixture
def cluster():
    return FakeCluster()


@pytest.fixture
def known(cluster, monkeypatch, tmp_path):
    """The shipped cards, of which one is loaded and another one is on the disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tests.app_utils.CARDS", read_cards())
    cluster.infos = {"gpt2": msgspec.structs.replace(INFO, name="gpt2")}
    return make_app(cluster).test_client()


def test_models_that_are_not_loaded_are_listed_behind(known):
    listed = {model["id"]: model for model in known.get("/v1/models").json["data"]}
    assert len(listed) == 7
    assert next(iter(listed)) == "gpt2"
    assert listed["gpt2"]["state"] == "loaded"
    for name, model in listed.items():
        assert known.get(f"/v1/models/{name}").json == model
    bundled, missing = listed["shakespeare-char"], listed["gpt2-xl"]
    assert (bundled["state"], bundled["command"]) == ("available", None)
    assert bundled["created"] > 0
    assert (missing["state"], missing["created"]) == ("not_available", 0)
    assert missing["command"] == "nanogpt fetch gpt2-xl"
    assert missing["num_parameters"] == 1_557_611_200
    assert known.get("/v1/models/openai-community/gpt2-xl").json == missing


def test_a_request_for_a_model_that_is_not_loaded_says_how_to_get_it(known):
    for name, said in (
        ("gpt2-xl", "nanogpt fetch gpt2-xl`, and start the server with --model gpt2-xl"),
        ("openai-community/gpt2-xl", "`nanogpt fetch gpt2-xl`"),
        ("shakespeare-finetune", "train --config configs/train/shakespeare_finetune.toml`"),
        ("shakespeare-char", "is not loaded: start the server with --model shakespeare-char"),
    ):
        for response in (
            complete(known, model=name),
            known.post("/tokenize", json={"prompt": "x", "model": name}),
        ):
            assert_error(response, 404, code="model_not_found", param="model")
            assert said in response.json["error"]["message"]
            assert response.json["error"]["message"].endswith("there are: gpt2")


def test_a_key_sees_only_its_cards(cluster, known):
    table = {"keys": {"team-a": {"models": ["gpt2", "gpt2-large"]}}}
    client = make_app(cluster, table=table, environ=CLOSED).test_client()
    listed = client.get("/v1/models", headers=bearer(KEY)).json["data"]
    assert [model["id"] for model in listed] == ["gpt2", "gpt2-large"]
    response = complete(client, bearer(KEY), model="gpt2-xl")
    assert "does not exist" in response.json["error"]["message"]


def test_without_the_hubs_client(known, monkeypatch):
    """A web server is set up without it: what it has no weights of is not available there."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    listed = {model["id"]: model["state"] for model in known.get("/v1/models").json["data"]}
    assert listed["gpt2-xl"] == "not_available"
    assert complete(known, model="gpt2-xl").status_code == 404


def test_listing_loads_no_torch():
    """In a process of its own, with the hub's real client."""
    code = (
        "import sys; from nanogpt.registry import read_cards; "
        "print([c.modified is None for c in read_cards().values()], "
        "[m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stderr


@pytest.fixture
def closed(cluster):
    return make_app(cluster, environ=CLOSED).test_client()


def operate(closed, path="", key=ADMIN_KEY, **more):
    call = closed.post if path else closed.get
    return call(f"/admin/models{path}", headers=bearer(key), **more)


def test_operators_see_the_memory_of_models(closed):
    listed = operate(closed).json
    assert (listed["memory_bytes"], listed["memory_limit_bytes"]) == (10**6, None)
    (model,) = listed["data"]
    assert (model["id"], model["state"], model["pinned"]) == (INFO.name, "loaded", False)
    assert (model["running"], model["waiting"], model["last_used"]) == (1, 0, None)


def test_operators_load_unload_and_pin_by_name_or_alias(closed):
    name = INFO.name
    assert operate(closed, f"/{name}/unload").json["state"] == "unloading"
    assert closed.get(f"/v1/models/{name}", headers=bearer(KEY)).json["state"] == "unloading"
    assert operate(closed, "/fake/load").json["state"] == "loading"
    assert operate(closed, f"/{name}/pin").json["pinned"] is True
    assert_error(operate(closed, f"/{name}/unload"), 409, "conflict_error")
    assert operate(closed, f"/{name}/unpin", json={}).json["pinned"] is False


def test_only_operators_may_and_only_what_there_is(closed):
    assert_error(operate(closed, key=KEY), 401, code="invalid_api_key")
    assert_error(operate(closed, f"/{INFO.name}/load", key=KEY), 401, code="invalid_api_key")
    assert_error(operate(closed, "/nothing/load"), 404, code="model_not_found", param="model")
    assert_error(operate(closed, f"/{INFO.name}/load", json={"a": 1}), 400, param="a")
    assert_error(operate(closed, f"/{INFO.name}/load?key=x"), 400, param="key")


def test_a_model_that_is_not_in_memory_answers_like_any_other(cluster, closed):
    cluster.states[INFO.name] = cluster.states[INFO.name]._replace(state="absent")
    assert closed.get(f"/v1/models/{INFO.name}", headers=bearer(KEY)).json["state"] == "available"
    assert complete(closed, bearer(KEY)).status_code == 200


def test_who_waited_in_vain_for_a_model_is_told_when_to_come_back(cluster):
    def refuse(request):
        return [[RequestFailed(request.request_id, "no room", "model_not_loaded", 10)]]

    cluster.script = refuse
    response = complete(make_app(cluster).test_client())
    assert_error(response, 503, "server_error", code="model_not_loaded")
    assert response.headers["Retry-After"] == "10"
    assert response.json["error"]["message"] == "no room"


def test_the_memory_of_models_is_in_the_metrics(cluster):
    lines = make_app(cluster).test_client().get("/metrics").text.splitlines()
    assert f'nanogpt_model_resident{{model="{INFO.name}"}} 1.0' in lines
    assert f'nanogpt_model_loads_total{{model="{INFO.name}"}} 1.0' in lines
