"""Two GPT-2 shapes and the Shakespeare model in real processes: with memory for all of them, and
with memory for one at a time."""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from nanogpt.bench.__main__ import main
from tests.hf_models import write_model
from tests.server import Server, serving

ADMIN_KEY, KEY = "a" * 24, "k" * 24
ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "NANOGPT_ADMIN_KEY": ADMIN_KEY,
    "NANOGPT_API_KEYS": f"team={KEY}",
}
SHAPES = {
    "wide": {"n_layer": 2, "n_head": 4, "n_embd": 256, "n_positions": 128},
    "deep": {"n_layer": 4, "n_head": 2, "n_embd": 256, "n_positions": 128},
}
CHARS = "shakespeare-char"
MODELS = ("wide", "deep", CHARS)
ROOM_FOR_ONE = "0.07"  # GiB: wide takes 0.053, deep 0.056, the Shakespeare model 0.03
REQUESTS = 4  # of each model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Options for both shapes; the directories of their weights stay the same."""
    root = tmp_path_factory.mktemp("shapes")
    for seed, (name, shape) in enumerate(SHAPES.items()):
        write_model(root / name, seed=seed, **shape)
    return root


def start(weights, memory_gib: str):
    options = [part for name in SHAPES for part in ("--model", f"{name}={weights / name}")]
    environ = {**ENVIRON, "NANOGPT_RESIDENCY_MEMORY_GIB": memory_gib}
    return serving("--ranks", "2", *options, "--model", CHARS, environ=environ)


@pytest.fixture(scope="module")
def roomy(weights):
    with start(weights, "1") as server:
        yield server


@pytest.fixture(scope="module")
def texts(roomy):
    """What each request is answered while every model is in memory."""
    with client_of(roomy) as client:
        return {(m, i): ask(client, m, i) for m in MODELS for i in range(REQUESTS)}


@pytest.fixture
def cramped(weights):
    with start(weights, ROOM_FOR_ONE) as server:
        yield server


@pytest.fixture
def roomy_client(roomy):
    with client_of(roomy) as client:
        yield client


@pytest.fixture
def client(cramped):
    with client_of(cramped) as client:
        yield client


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[openai.OpenAI]:
    with server.client(api_key=KEY, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, model: str, number: int) -> list[str]:
    done = client.completions.create(
        model=model, prompt=f"To be {'ABCD'[number]}", max_tokens=24, n=3, seed=number
    )
    return [choice.text for choice in done.choices]


def mixed_load(server: Server) -> dict[tuple[str, int], list[str]]:
    """All requests at once; one that failed is not in the result."""
    found = {}

    def one(model: str, number: int) -> None:
        with client_of(server) as client:
            found[model, number] = ask(client, model, number)

    threads = [threading.Thread(target=one, args=(m, i)) for i in range(REQUESTS) for m in MODELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def operate(server: Server, command: str = "", model: str = "") -> httpx.Response:
    url, headers = f"{server.url}/admin/models", {"Authorization": f"Bearer {ADMIN_KEY}"}
    if command:
        return httpx.post(f"{url}/{model}/{command}", headers=headers)
    return httpx.get(url, headers=headers)


def states(server: Server) -> dict[str, dict]:
    return {each["id"]: each for each in operate(server).json()["data"]}


def wait_until(server: Server, model: str, state: str) -> None:
    deadline = time.monotonic() + 60
    while states(server)[model]["state"] != state:
        assert time.monotonic() < deadline, operate(server).text
        time.sleep(0.05)


def memory(server: Server) -> list[int]:
    return [rank.memory_info().rss for rank in server.ranks()]


def test_with_memory_for_all_nothing_moves(roomy, texts):
    assert mixed_load(roomy) == texts
    after = states(roomy)
    assert {after[model]["state"] for model in MODELS} == {"loaded"}
    assert sum(each["loads"] + each["evictions"] for each in after.values()) == 0


def test_an_operator_unloads_and_the_memory_comes_back(roomy, roomy_client, texts):
    """Also of a model that was there from the start, whose objects no garbage collection sees."""
    client = roomy_client
    for round in range(2):
        ask(client, "wide", 0)
        size, before = states(roomy)["wide"]["memory_bytes"], memory(roomy)
        assert operate(roomy, "unload", "wide").status_code == 200
        wait_until(roomy, "wide", "available")
        freed = [a - b for a, b in zip(before, memory(roomy), strict=True)]
        weights = 2 * 2 * 50257 * 256  # embeddings and head, of 16 bits
        assert all(weights * 0.9 < each < size * 1.5 for each in freed), (round, freed, size)
        listed = client.models.retrieve("wide")
        assert listed.state == "available"
        assert ask(client, "wide", 1) == texts["wide", 1]
        assert states(roomy)["wide"]["loads"] == round + 1


def test_a_pinned_model_can_not_be_unloaded(roomy):
    assert operate(roomy, "pin", "deep").json()["pinned"] is True
    refused = operate(roomy, "unload", "deep")
    assert refused.status_code == 409
    assert "unpin" in refused.json()["error"]["message"]
    assert operate(roomy, "unpin", "deep").json()["pinned"] is False
    assert operate(roomy, "load", "nothing").status_code == 404
    assert httpx.get(f"{roomy.url}/admin/models").status_code == 401


def test_with_memory_for_one_all_are_served_also_when_ranks_die_in_between(cramped, client, texts):
    before = memory(cramped)
    killed = []

    def kill() -> None:
        for count in (2, 5):  # ranks have begun to load so often
            cramped.wait_for(r"rank 1 .* loading ", count)
            rank = cramped.ranks()[len(killed)]
            killed.append(rank.pid)
            rank.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    assert mixed_load(cramped) == texts
    for model in MODELS:
        assert ask(client, model, 0) == texts[model, 0]
    thread.join()
    assert len(killed) == 2
    after = states(cramped)
    assert sum(each["state"] == "loaded" for each in after.values()) == 1
    assert sum(each["evictions"] for each in after.values()) >= 2
    assert all(b - a < 64 * 2**20 for a, b in zip(before, memory(cramped), strict=True))


def test_what_can_not_be_loaded_is_told_and_the_others_live_on(cramped, client, weights, texts):
    assert ask(client, "wide", 0) == texts["wide", 0]
    file, whole = weights / "deep" / "model.safetensors", weights / "deep.whole"
    whole.write_bytes(file.read_bytes())
    broken = weights / "deep.broken"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    os.replace(broken, file)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "deep", 0)
    assert caught.value.status_code == 500
    assert caught.value.code == "model_load_failed"
    assert "can't read" in states(cramped)["deep"]["problem"]
    assert ask(client, "wide", 1) == texts["wide", 1]
    os.replace(whole, file)
    assert operate(cramped, "load", "deep").status_code == 200
    wait_until(cramped, "deep", "loaded")
    assert ask(client, "deep", 1) == texts["deep", 1]


def test_the_front_end_s_successor_knows_what_is_in_memory_and_what_is_pinned(
    cramped, client, texts
):
    ask(client, "deep", 0)
    operate(cramped, "pin", "deep")
    ready = len(re.findall("^ready: ", cramped.output, re.MULTILINE))
    for process in cramped.below():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.endswith("frontend.py") for part in process.cmdline()):
                process.kill()
    cramped.wait_for("^ready: ", ready + 1)
    after = states(cramped)
    assert (after["deep"]["state"], after["deep"]["pinned"]) == ("loaded", True)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "wide", 0)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_room"
    assert "pinned deep" in str(caught.value)


def test_switching_is_measured(roomy, capsys, tmp_path):
    plot = tmp_path / "p.png"
    argv = ["switching", "--url", f"{roomy.url}/v1", "--models", f"wide,{CHARS}", "--api-key", KEY]
    argv += ["--requests", "2", "--rounds", "2", "--output-len", "3", "--plot", str(plot)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["results"]
    assert [(f["model"], f["requests"]) for f in found] == [("wide", 4), (CHARS, 4)]
    for one in found:
        assert min(one["in_a_row_ms"], one["by_turns_ms"]) > 0
        assert one["lowest_ms"] <= one["added_ms"] <= one["highest_ms"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert KEY not in out
