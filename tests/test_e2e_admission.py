"""Admission in the real server: keys, limits and a ban from the command line while it runs."""

import json
import subprocess
import sys
import time

import httpx
import openai
import pytest

from nanogpt.api.admission.live import REFRESH_S
from tests.server import ROOT, serving

MODEL = "shakespeare-char"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("admission")
    path = directory / "serve.toml"
    path.write_text(
        f"""
ranks = 1
[admission]
state = "{directory}/state.sqlite"
key_limits = {{ requests_per_minute = 30, tokens_per_minute = 2000 }}
[admission.user_limits]
requests_per_minute = 2
"""
    )
    return path


def admin(config, *arguments: str) -> str:
    command = [sys.executable, "-m", "nanogpt.admin", "--config", str(config), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def complete(client, **fields):
    return client.completions.create(model=MODEL, prompt="ROMEO:", max_tokens=8, **fields)


def test_a_server_with_keys_limits_and_bans(config):
    state = config.with_name("state.sqlite")
    key = admin(config, "keys", "create", "team-a")
    admin_key = admin(config, "keys", "create", "ops", "--admin")
    with (
        serving("--config", str(config), environ={"NANOGPT_ADMISSION_STATE": str(state)}) as server,
        server.client(api_key=key) as client,
        server.client(api_key="sk-wrong") as stranger,
        httpx.Client(base_url=server.url, timeout=30) as operator,
    ):
        assert operator.get("/health").status_code == 200
        assert operator.get("/ready").status_code == 200
        assert operator.get("/metrics").status_code == 401
        operator.headers["Authorization"] = f"Bearer {admin_key}"
        with pytest.raises(openai.AuthenticationError) as unknown:
            complete(stranger)
        assert unknown.value.response.headers["www-authenticate"].startswith("Bearer")

        complete(client, user="mallory")
        admin(config, "users", "ban", "mallory", "--reason", "scraping", "--for", "1h")
        wait_until_banned(operator, "mallory")
        with pytest.raises(openai.PermissionDeniedError) as banned:
            complete(client, user="mallory")
        assert banned.value.code == "user_banned"
        assert "scraping" in banned.value.message
        assert banned.value.response.headers["x-should-retry"] == "false"

        complete(client, user="alice")
        chunks = list(complete(client, user="alice", stream=True))
        assert sum(len(chunk.choices[0].text) for chunk in chunks) == 8
        with pytest.raises(openai.RateLimitError) as limited:
            complete(client, user="alice")
        headers = limited.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 61
        assert headers["x-ratelimit-remaining-requests"] == "0"
        used = 3 * (len("ROMEO:") + 8)
        assert headers["x-ratelimit-remaining-tokens"] == str(2000 - used)

        why = operator.get("/admin/users/mallory/explain").json()
        assert "scraping" in why["blocked"]
        assert why["decisions"][0]["code"] == "user_banned"
        assert operator.post("/admin/users/mallory/unban").json()["lifted"]
        assert complete(client, user="mallory").choices[0].text
        counted = 'nanogpt_admission_total{code="requests",decision="refused"} 1.0'
        assert counted in operator.get("/metrics").text
        assert server.stop() == 0
        output = server.output

    audit = config.with_name("audit.jsonl").read_text()
    entries = [json.loads(line) for line in audit.splitlines()]
    assert [e["decision"] for e in entries].count("admitted") == 4
    assert "invalid_api_key" in [e.get("code") for e in entries]
    assert "ROMEO" not in audit
    for secret in (key, admin_key):
        assert secret not in audit + output + state.read_bytes().decode("latin-1")


def wait_until_banned(operator, user: str) -> None:
    """A server looks for what others changed each half second, when a request comes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if operator.get(f"/admin/users/{user}/explain").json()["blocked"]:
            time.sleep(REFRESH_S)
            return
        time.sleep(0.05)
    raise AssertionError("no ban")
