"""Web server, Redis and two clusters, each in processes of its own: the same API, whatever dies."""

import contextlib
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.redis_server import redis_server
from tests.server import SLIDING, Server

MODEL = "shakespeare-char"
PROMPT = "ROMEO:"
LONG = 150  # tokens
LONGEST = 240  # that go into the model's context
KEY = "k" * 24
WAIT_S = 90  # a busy machine may take long; a test never waits for this when all is well


def wait_for(condition):
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


class Split:
    """A web server, its queue, and clusters."""

    def __init__(self, redis, stack) -> None:
        self.redis, self._stack = redis, stack
        self.web = self._start("web", "--queue", redis.url)
        self.workers = [self.start_worker(), self.start_worker()]
        self.web.wait_for("^ready: ")
        for worker in self.workers:
            worker.wait_for("^ready: ")
        self.client = self.web.client(timeout=3 * WAIT_S)
        # Each of the web server's processes hears of the clusters by itself, within a second.
        wait_for(lambda: all(self.is_ready() for _ in range(20)))

    def _start(self, role: str, *options: str) -> Server:
        server = Server("--role", role, *options)
        self._stack.callback(server.close)
        return server

    def start_worker(self) -> Server:
        return self._start("worker", "--queue", self.redis.url)

    def is_ready(self) -> bool:
        body = httpx.get(f"{self.web.url}/ready").json()
        return body["ready"] and body["ranks"] == 2

    def whole(self, **fields) -> str:
        return self.client.completions.create(**ask(**fields)).choices[0].text

    def stream(self, **fields):
        """Pieces of text as they come."""
        for chunk in self.client.completions.create(**ask(stream=True, **fields)):
            yield chunk.choices[0].text

    def holder(self) -> Server:
        """The cluster that generates: for when there is one request."""
        return wait_for(lambda: next((w for w in self.workers if self._running(w)), None))

    def _running(self, worker: Server) -> bool:
        if worker.process.poll() is not None:
            return False
        text = httpx.get(f"{worker.url}/metrics", headers={}).text
        lines = [line for line in text.splitlines() if line.startswith("nanogpt_running{")]
        return any(float(line.rsplit(" ", 1)[1]) for line in lines)


def ask(**fields):
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": LONG, "seed": 5, **fields}


def kill(server: Server) -> None:
    """All of a machine's processes at once, as if it had lost its power."""
    tree = [psutil.Process(server.process.pid), *server.below()]
    for process in tree:  # stopped first, so that none sees the others die
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server(tmp_path_factory.mktemp("redis")))
        yield Split(redis, stack)


@pytest.fixture(scope="module")
def text(split):
    """What nobody disturbed."""
    return split.whole()


def test_the_web_server_has_no_torch(split):
    pids = [split.web.process.pid, *(process.pid for process in split.web.below())]
    assert len(pids) > 1
    for pid in pids:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_whole_and_streamed_are_the_same(split, text):
    assert len(text) == LONG
    pieces = list(split.stream())
    assert len(pieces) > 2  # a quick machine puts many tokens into a piece
    assert "".join(pieces) == text


def test_models_and_their_tokenizers_are_known(split):
    assert MODEL in [model.id for model in split.client.models.list()]
    answer = httpx.post(f"{split.web.url}/tokenize", json={"model": MODEL, "prompt": PROMPT})
    assert answer.json()["count"] == len(PROMPT)


def test_stop_strings_choices_and_logprobs(split, text):
    stop = text[20:24]
    assert split.whole(stop=[stop]) == text[: text.index(stop)]
    answer = split.client.completions.create(**ask(n=2, max_tokens=8, logprobs=2, echo=True))
    assert [c.index for c in answer.choices] == [0, 1]
    assert all(c.text.startswith(PROMPT) for c in answer.choices)
    assert len(answer.choices[0].logprobs.tokens) == len(PROMPT) + 8


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 9.0}, openai.BadRequestError, "temperature"),
    ],
)
def test_errors_are_those_of_one_machine(split, fields, kind, param):
    with pytest.raises(kind) as error:
        split.client.completions.create(**ask(**fields))
    assert error.value.param == param


def test_a_client_that_leaves_stops_the_work(split):
    stream = split.client.completions.create(**ask(stream=True, **SLIDING))
    next(iter(stream))
    split.holder()
    stream.close()
    wait_for(lambda: not any(split._running(worker) for worker in split.workers))


def test_background_and_batch(split, text):
    body = ask(background=True)
    job = httpx.post(f"{split.web.url}/v1/completions", json=body).json()
    assert job["status"] == "queued"
    url = f"{split.web.url}/v1/completions/{job['id']}"
    done = wait_for(lambda: (now := httpx.get(url).json())["status"] == "completed" and now)
    assert done["choices"][0]["text"] == text

    line = (
        '{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": '
        '{"model": "shakespeare-char", "prompt": "A", "max_tokens": 3}}\n'
    )
    lines = "".join(line % i for i in range(20)).encode()
    file = split.client.files.create(file=("in.jsonl", lines), purpose="batch")
    assert split.client.files.content(file.id).read() == lines
    batch = split.client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )

    def ended():
        now = split.client.batches.retrieve(batch.id)
        return now.status in ("completed", "failed") and now

    batch = wait_for(ended)
    assert (batch.status, batch.request_counts.completed) == ("completed", 20)
    output = split.client.files.content(batch.output_file_id).text
    assert len(output.splitlines()) == 20


def test_limits_are_those_of_all_processes_together(split, tmp_path):
    """Two web servers, of which the second knows nothing but the queue."""
    limits = tmp_path / "limits.toml"
    limits.write_text("[admission.key_limits]\nrequests_per_minute = 3\n")
    with contextlib.ExitStack() as stack:
        urls = []
        for _ in range(2):
            options = ("--config", str(limits), "--queue", split.redis.url)
            server = Server("--role", "web", *options, environ={"NANOGPT_API_KEYS": f"k={KEY}"})
            stack.callback(server.close)
            server.wait_for("^ready: ")
            urls.append(server.url)
        headers = {"Authorization": f"Bearer {KEY}"}
        for url in urls:
            wait_for(lambda url=url: httpx.get(f"{url}/ready").json()["ready"])
        answers = [
            httpx.post(f"{url}/v1/completions", json=ask(max_tokens=1), headers=headers, timeout=60)
            for url in urls * 2
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]


def test_a_repeat_with_the_same_key_is_the_same_answer(split):
    bodies = {
        httpx.post(
            f"{split.web.url}/v1/completions",
            json=ask(max_tokens=5, seed=None),
            headers={"Idempotency-Key": "one"},
            timeout=60,
        ).content
        for _ in range(2)
    }
    assert len(bodies) == 1


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "two"}], ids=["plain", "kept"])
def test_a_stream_outlives_its_redis(split, text, headers):
    """Nothing that was accepted is lost when Redis is killed; new work is told to come back."""
    pieces = split.stream(extra_headers=headers)
    got = [next(pieces)]
    split.redis.kill()
    answer = httpx.post(f"{split.web.url}/v1/completions", json=ask(max_tokens=1), timeout=60)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert int(answer.headers["Retry-After"]) > 0
    split.redis.start()
    got += pieces
    assert "".join(got) == text
    assert split.whole(max_tokens=10) == text[:10]


def test_a_cluster_that_is_killed_loses_nothing(split):
    """Mid-stream: another one goes on from the tokens that the client has."""
    text = split.whole(**SLIDING)
    pieces = split.stream(**SLIDING)
    got = [next(pieces)]
    kill(split.holder())
    got += pieces
    assert "".join(got) == text
    assert sum(worker.process.poll() is None for worker in split.workers) == 1


def test_a_killed_web_process_is_replaced(split, text):
    for process in split.web.below():
        process.kill()
    wait_for(lambda: _answers(split))
    assert split.whole(max_tokens=10) == text[:10]


def _answers(split) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return bool(httpx.get(f"{split.web.url}/ready").json()["ready"])
    return False


def test_requests_wait_while_no_cluster_is_there(split, text):
    """The last one is told to end: what it has it finishes, and the rest is for the next one."""
    whole = split.whole(max_tokens=LONGEST)
    (last,) = (worker for worker in split.workers if worker.process.poll() is None)
    pieces = split.stream(max_tokens=LONGEST)
    got = [next(pieces)]
    assert last.stop() == 0
    got += pieces  # nobody else could go on
    assert "".join(got) == whole
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(split.whole(max_tokens=20)))
    waiting.start()
    split.workers.append(split.start_worker())
    waiting.join(WAIT_S)
    assert found == [text[:20]]


def test_everything_ends_with_sigterm(split):
    assert split.web.stop(signal.SIGTERM) == 0
    assert split.workers[-1].stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("role", ["web", "worker"])
def test_a_role_needs_a_queue(role):
    done = subprocess.run(
        ["./launch.sh", "--role", role], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--queue redis://" in done.stderr
