"""The whole product: the real launch.sh, two ranks, the bundled model, the official client."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import threading
import time

import httpx
import openai
import psutil
import pytest

from nanogpt.network import free_port
from tests.deployments import Deployment
from tests.server import ROOT, SLIDING, serving

MODEL = "shakespeare-char"
PROMPT = "ROMEO:"


def complete(client, **params):
    return client.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "max_tokens": 32, **params}
    )


def text_of_stream(client, **params) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in complete(client, stream=True, **params):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def test_ready_line_says_where_and_what(server):
    line = server.wait_for("^ready: ")
    assert line == f"ready: {server.url}  models: {MODEL}  ranks: 2"


def test_four_choices_differ_and_come_from_both_ranks(client):
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=64, n=4, seed=1
    )
    answer = raw.parse()
    assert sorted(raw.headers["x-nanogpt-ranks"].split(",")) == ["0", "0", "1", "1"]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 4
    assert all(len(text) == 64 for text in texts)  # a character is a token
    assert answer.usage.completion_tokens == 4 * 64
    assert answer.usage.prompt_tokens == len(PROMPT)


def test_text_is_like_shakespeare(client):
    """The bundled model has learned words: most of what it writes is in the play's vocabulary."""
    common = "the and to of i you my that a in is not me it for with be your his this but he have"
    text = complete(client, max_tokens=240, seed=3, temperature=0.8).choices[0].text.lower()
    words = "".join(c if c.isalpha() else " " for c in text).split()
    assert len(set(words) & set(common.split())) >= 5, text


def test_stream_equals_unstreamed(any_client):
    whole = complete(any_client, n=3, seed=11)
    assert text_of_stream(any_client, n=3, seed=11) == {c.index: c.text for c in whole.choices}


def test_seed_fixes_the_text_whatever_the_load(any_client):
    def alone():
        return [c.text for c in complete(any_client, n=2, seed=5, max_tokens=48).choices]

    quiet = alone()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(complete, any_client, n=3, max_tokens=64) for _ in range(6)]
        busy = [pool.submit(alone) for _ in range(2)]
        assert all(b.result() == quiet for b in busy)
        assert all(f.result().choices for f in noise)
    assert [c.text for c in complete(any_client, n=2, seed=6, max_tokens=48).choices] != quiet


def test_greedy_choices_are_equal(client):
    texts = {c.text for c in complete(client, n=4, temperature=0).choices}
    assert len(texts) == 1


def test_prompt_list_keeps_its_order(any_client):
    prompts = ["ROMEO:", "JULIET:", "First Citizen:"]
    answer = complete(any_client, prompt=prompts, n=2, echo=True, max_tokens=4, seed=2)
    assert [c.index for c in answer.choices] == list(range(6))
    for i, choice in enumerate(answer.choices):
        assert choice.text.startswith(prompts[i // 2])


def test_stop_string_ends_the_choice_and_never_shows(any_client):
    free = complete(any_client, seed=4, max_tokens=120).choices[0].text
    stop = free[40:43]
    answer = complete(any_client, seed=4, max_tokens=120, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == free[: free.index(stop)]
    assert (
        text_of_stream(any_client, seed=4, max_tokens=120, stop=stop)[0] == answer.choices[0].text
    )


def test_usage_comes_last_in_a_stream(any_client):
    chunks = list(complete(any_client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 32
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("params", "kind", "word"),
    [
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context"),
        ({"model": "gpt-9"}, openai.NotFoundError, "gpt-9"),
        ({"prompt": "né"}, openai.BadRequestError, "é"),
        ({"extra_body": {"bogus": 1}}, openai.BadRequestError, "bogus"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        # Logits that leave no token were a 500: found by a schema-driven fuzzer.
        ({"extra_body": {"repetition_penalty": 5e-324}}, openai.BadRequestError, "repetition"),
        (
            {"extra_body": {"min_tokens": 1, "stop_token_ids": list(range(65))}},
            openai.BadRequestError,
            "stop_token_ids",
        ),
    ],
)
def test_bad_requests_say_what_is_wrong(any_client, params, kind, word):
    with pytest.raises(kind) as refused:
        complete(any_client, **params)
    assert word in refused.value.message
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def test_health_and_models(deployment, any_client):
    assert httpx.get(f"{deployment.web.url}/health").status_code == 200
    assert httpx.get(f"{deployment.web.url}/ready").status_code == 200
    assert [m.id for m in any_client.models.list() if m.state == "loaded"] == [MODEL]


def wait_until(condition, seconds=20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_a_client_that_leaves_cancels_its_work(deployment, any_client):
    wait_until(lambda: deployment.running() == 0)
    stream = complete(any_client, n=8, stream=True, **SLIDING)
    next(iter(stream))
    wait_until(lambda: deployment.running() > 0)
    stream.close()
    wait_until(lambda: deployment.running() == 0)


def test_many_choices_of_one_user_do_not_starve_another():
    """Eight places, all taken by one user's 64 choices: another's single one gets through at once,
    and the first goes on meanwhile."""
    with serving(environ={"NANOGPT_ENGINE_MAX_NUM_SEQS": "8"}) as server:
        client = server.client()
        many = complete(client, n=64, max_tokens=60, user="many", stream=True)
        progress = [0]
        finished = threading.Event()

        def follow() -> None:
            for _ in many:
                progress.append(progress[-1] + 1)
            finished.set()

        reader = threading.Thread(target=follow)
        reader.start()
        wait_until(lambda: progress[-1] > 50)
        before = progress[-1]
        chunks = list(complete(client, max_tokens=20, user="one", stream=True))
        assert "".join(c.choices[0].text for c in chunks if c.choices)
        assert not finished.is_set()  # 3,840 tokens, eight at a time, are far from done
        wait_until(lambda: progress[-1] > before)
        wait_until(finished.is_set, 120)
        reader.join()


def test_killed_rank_comes_back_and_the_request_goes_on(server, client):
    want = [c.text for c in complete(client, n=4, seed=9, max_tokens=200).choices]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pending = pool.submit(complete, client, n=4, seed=9, max_tokens=200)
        wait_until(lambda: Deployment(server, server).running() > 0 or pending.done())
        server.ranks()[1].kill()
        got = [c.text for c in pending.result(120).choices]
    assert got == want
    server.wait_for("epoch .* 2 ranks", count=2)
    assert len(complete(client, n=2).choices) == 2


def test_ctrl_c_leaves_nothing_behind():
    with serving() as server:
        processes = server.below()
        assert len(processes) >= 4  # torchrun, a rank, the front end's master and worker
        assert server.stop(signal.SIGINT) == 0
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive
        assert "Traceback" not in server.output
        assert "rror" not in server.output


NOBODY = 65534
# Whoever reads everything does not depend on where the tree, and Python, are.
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


def test_an_ordinary_user_starts_what_root_has_set_up(tmp_path):
    """Without the right to write anything into the tree."""
    may = os.getuid() == 0 and shutil.which("setpriv")
    if not may or subprocess.run([*AS_NOBODY, "true"]).returncode:
        pytest.skip("there is no way to become an ordinary user")
    os.chown(tmp_path, NOBODY, NOBODY)
    environ = {"NANOGPT_JOBS_PATH": str(tmp_path / "jobs"), "HOME": str(tmp_path)}
    with serving("--ranks", "2", environ=environ, within=AS_NOBODY) as server:
        assert complete(server.client(), n=2).choices[1].text
        assert complete(server.client(), extra_body={"background": True}).id
        assert {process.uids().real for process in server.below()} == {NOBODY}
        assert server.stop() == 0


def test_killed_launcher_takes_everything_with_it():
    with serving() as server:
        processes = server.below()
        server.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive


def refused(*options: str) -> str:
    """The one line with which a start is refused."""
    done = subprocess.run(
        [str(ROOT / "launch.sh"), *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    return lines[0]


def test_refusals_are_one_clear_line(server, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    port = str(free_port())
    assert "in use" in refused("--port", str(server.port))
    assert "--port" in refused("--prot", "1")
    assert "nope.toml" in refused("--config", "nope.toml")
    assert "shakespeare-char" in refused("--model", "shakespear-char")
    assert "/none" in refused("--port", port, "--model", "x=/none")
    assert str(broken) in refused("--port", port, "--model", f"x={broken}")
    typo = tmp_path / "typo.toml"
    typo.write_text("prot = 1\n")
    assert "port" in refused("--config", str(typo))
