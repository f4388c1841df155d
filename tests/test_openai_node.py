"""OpenAI's official client for JavaScript, against the real server."""

import json
import shutil
import subprocess

import pytest

from tests.server import ROOT

CLIENT = ROOT / "tests" / "node"
INSTALLED = ROOT / ".venv" / "node"  # dev/setup.sh test

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (INSTALLED / "node_modules" / "openai").is_dir(),
    reason="needs node, and npm when the tests are set up",
)


@pytest.fixture(scope="module")
def answers(server) -> dict:
    script = shutil.copy(CLIENT / "client.mjs", INSTALLED)
    done = subprocess.run(
        ["node", script, f"{server.url}/v1", "shakespeare-char"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_answer_is_the_python_clients(answers, client):
    """Both clients see the same text, log probabilities and usage."""
    expected = client.completions.create(
        model="shakespeare-char", prompt="ROMEO:", max_tokens=24, seed=5, n=2, logprobs=2
    ).model_dump()
    whole = answers["whole"]
    assert [c["text"] for c in whole["choices"]] == [c["text"] for c in expected["choices"]]
    assert [c["logprobs"] for c in whole["choices"]] == [c["logprobs"] for c in expected["choices"]]
    assert whole["usage"]["completion_tokens"] == 48


def test_a_stream_is_the_same_text(answers):
    streamed, whole = answers["streamed"], answers["whole"]
    assert streamed["texts"] == [choice["text"] for choice in whole["choices"]]
    assert streamed["reasons"] == ["length", "length"]
    assert streamed["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_models_are_listed(answers):
    assert "shakespeare-char" in answers["models"]


@pytest.mark.parametrize(
    ("what", "name", "status", "code", "param"),
    [
        ("range", "BadRequestError", 400, None, "temperature"),
        ("model", "NotFoundError", 404, "model_not_found", "model"),
        ("field", "BadRequestError", 400, None, "colour"),
    ],
)
def test_mistakes_are_the_clients_own_errors(answers, what, name, status, code, param):
    refused = answers["refused"][what]
    assert (refused["name"], refused["status"]) == (name, status)
    assert (refused["code"], refused["param"]) == (code, param)
    assert refused["type"] == "invalid_request_error"
