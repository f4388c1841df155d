"""Stored work on the real server: the official client, and kill -9 of everything in the middle."""

import contextlib
import http.server
import json
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from openai.types import Completion

from nanogpt.network import free_port
from tests.server import Server, serving

MODEL = "shakespeare-char"
WAIT_S = 240  # a busy machine may take long; a test never waits for this when all is well


def create(client: openai.OpenAI, **params):
    extra = {k: params.pop(k) for k in ("background", "metadata") if k in params}
    fields = {"model": MODEL, "prompt": "ROMEO:", "max_tokens": 40, "seed": 7, **params}
    return client.completions.create(**fields, extra_body=extra)


def poll(client: openai.OpenAI, completion_id: str) -> Completion:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = client.get(f"/completions/{completion_id}", cast_to=Completion)
        if found.status not in ("queued", "in_progress"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"not done: {found}")


def poll_batch(client: openai.OpenAI, batch_id: str, *until: str):
    until = until or ("completed", "failed", "cancelled", "expired")
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in until:
            return batch
        time.sleep(0.05)
    raise AssertionError(f"not done: {batch}")


def stream_of(client: openai.OpenAI, completion_id: str, **query) -> openai.Stream[Completion]:
    return client.get(
        f"/completions/{completion_id}",
        cast_to=Completion,
        stream=True,
        stream_cls=openai.Stream[Completion],
        options={"params": {"stream": "true", **query}},
    )


def _is_frontend(process: psutil.Process) -> bool:
    try:
        return "frontend" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def kill_all(server: Server) -> None:
    """kill -9 of every process of the server, the front end and its master first."""
    processes = sorted(server.below(), key=_is_frontend, reverse=True)  # they die with the launcher
    server.process.kill()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def line(i: int, **body) -> dict:
    fields = {"model": MODEL, "prompt": f"Line {i}:".translate(DIGITS), "max_tokens": 8, **body}
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": fields}


DIGITS = str.maketrans("0123456789", "abcdefghij")  # the model knows no digits


def upload(client: openai.OpenAI, lines: list[dict]) -> str:
    content = "\n".join(map(json.dumps, lines)).encode()
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def start_batch(client: openai.OpenAI, file_id: str, **more):
    return client.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h", **more
    )


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict]:
    if file_id is None:
        return []
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def test_background_equals_the_foreground(any_client):
    want = create(any_client, n=2)
    accepted = create(any_client, n=2, background=True, metadata={"a": "b"})
    assert accepted.status == "queued"
    done = poll(any_client, accepted.id)
    assert [c.text for c in done.choices] == [c.text for c in want.choices]
    assert (done.usage.completion_tokens, done.metadata) == (80, {"a": "b"})
    with pytest.raises(openai.NotFoundError):
        any_client.get("/completions/cmpl-none", cast_to=Completion)


def test_a_dropped_stream_is_taken_up_where_it_was(any_client):
    want = create(any_client, max_tokens=120).choices[0].text
    stream = create(any_client, max_tokens=120, background=True, stream=True)
    seen = [next(iter(stream)) for _ in range(3)]
    stream.close()
    rest = list(stream_of(any_client, seen[0].id, starting_after=seen[-1].sequence_number))
    numbers = [c.sequence_number for c in [*seen, *rest]]
    assert numbers == list(range(len(numbers)))
    assert "".join(c.choices[0].text for c in [*seen, *rest]) == want


def test_cancel_and_delete(any_client):
    accepted = create(any_client, n=32, max_tokens=240, background=True)
    cancelled = any_client.post(f"/completions/{accepted.id}/cancel", cast_to=Completion)
    assert cancelled.status in ("in_progress", "cancelled")
    assert poll(any_client, accepted.id).status == "cancelled"
    any_client.delete(f"/completions/{accepted.id}", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        any_client.get(f"/completions/{accepted.id}", cast_to=Completion)


def test_killed_with_everything_it_goes_on_to_the_same_text(client, tmp_path):
    """A background completion, and a stream under an Idempotency-Key, in the middle of a server
    of which every process is killed; the next one on the same jobs continues both."""
    want = create(client, max_tokens=240, n=16)  # seconds, so that the kill is in the middle
    environ = {"NANOGPT_JOBS_PATH": str(tmp_path / "jobs")}
    header = {"Idempotency-Key": "the-same"}
    with serving(environ=environ) as first:
        mine = first.client()
        accepted = create(mine, max_tokens=240, n=16, background=True)
        unseeded = create(mine, max_tokens=240, seed=None, background=True)
        stream = iter(create(mine, max_tokens=240, stream=True, extra_headers=header))
        followed = iter(stream_of(mine, accepted.id))
        seen = [next(followed) for _ in range(6)]
        begun = next(stream)
        drawn = next(iter(stream_of(mine, unseeded.id)))
        kill_all(first)
        with pytest.raises(openai.APIConnectionError):
            list(followed)
    with serving(environ=environ) as second:
        mine = second.client()
        rest = list(stream_of(mine, accepted.id, starting_after=seen[-1].sequence_number))
        texts = dict.fromkeys(range(16), "")
        for chunk in [*seen, *rest]:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == {c.index: c.text for c in want.choices}
        done = poll(mine, accepted.id)
        assert [c.text for c in done.choices] == [c.text for c in want.choices]
        again = list(create(mine, max_tokens=240, stream=True, extra_headers=header))
        assert again[0] == begun
        assert "".join(c.choices[0].text for c in again) == want.choices[0].text
        text = poll(mine, unseeded.id).choices[0].text
        assert len(text) == 240
        assert text.startswith(drawn.choices[0].text)


def test_a_stop_puts_work_back_at_once(tmp_path):
    environ = {"NANOGPT_JOBS_PATH": str(tmp_path / "jobs"), "NANOGPT_HTTP_DRAIN_S": "60"}
    with serving(environ=environ) as first:
        mine = first.client()
        accepted = create(mine, max_tokens=240, n=8, background=True)
        stream = iter(stream_of(mine, accepted.id))
        begun = next(stream)
        assert first.stop() == 0
        assert "Traceback" not in first.output
    with serving(environ=environ) as second:
        done = poll(second.client(), accepted.id)
        assert done.status == "completed"
        assert done.choices[begun.choices[0].index].text.startswith(begun.choices[0].text)


class FirstAnswerLost(http.server.BaseHTTPRequestHandler):
    """Passes requests on; of the first it reads the whole answer, and then breaks off."""

    target = ""
    headers_seen: list[str | None] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Idempotency-Key"]
        self.headers_seen.append(key)
        passed = urllib.request.Request(
            self.target + self.path,
            body,
            {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})},
        )
        with urllib.request.urlopen(passed, timeout=WAIT_S) as answer:
            content = answer.read()
        if len(self.headers_seen) == 1:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def test_the_clients_own_retry_gets_the_first_ones_answer(server):
    """The request has no seed: a second generation would not give the same text."""
    handler = type("Handler", (FirstAnswerLost,), {"target": server.url, "headers_seen": []})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{proxy.server_address[1]}/v1", api_key="none", max_retries=2
        )
        header = {"Idempotency-Key": "retry-1"}
        got = create(client, seed=None, extra_headers=header)
        assert handler.headers_seen == ["retry-1", "retry-1"]
        again = create(server.client(), seed=None, extra_headers=header)
        assert got == again
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


def test_duplicates_at_once_are_one_generation(server):
    header = {"Idempotency-Key": "at-once"}
    with ThreadPoolExecutor(5) as pool:
        tasks = [
            pool.submit(create, server.client(), seed=None, extra_headers=header) for _ in range(5)
        ]
        assert len({task.result().model_dump_json() for task in tasks}) == 1
    with pytest.raises(openai.ConflictError):
        create(server.client(), seed=1, extra_headers=header)


def test_a_batch_with_some_broken_lines(any_client):
    lines = [line(i, seed=i) for i in range(60)]
    lines[7]["body"]["max_tokens"] = -1
    lines[13]["body"]["model"] = "gpt-9"
    lines[20]["body"]["stream"] = True
    batch = start_batch(any_client, upload(any_client, lines), metadata={"a": "b"})
    assert batch.status == "validating"
    done = poll_batch(any_client, batch.id)
    assert done.status == "completed", done
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (60, 57, 3)
    output = {found["custom_id"]: found for found in lines_of(any_client, done.output_file_id)}
    errors = {found["custom_id"]: found for found in lines_of(any_client, done.error_file_id)}
    assert set(errors) == {"r7", "r13", "r20"}
    assert set(output) | set(errors) == {found["custom_id"] for found in lines}
    statuses = [errors[name]["response"]["status_code"] for name in ("r7", "r13", "r20")]
    assert statuses == [400, 404, 400]
    body = output["r5"]["response"]["body"]
    alone = any_client.completions.create(**lines[5]["body"])
    assert body["choices"][0]["text"] == alone.choices[0].text
    assert batch.id in [found.id for found in any_client.batches.list(limit=1)]


def test_a_batch_that_is_cancelled_keeps_what_is_done(any_client):
    batch = start_batch(
        any_client, upload(any_client, [line(i, max_tokens=100) for i in range(400)])
    )
    poll_batch(any_client, batch.id, "in_progress")
    assert any_client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = poll_batch(any_client, batch.id)
    assert done.status == "cancelled"
    output, errors = (
        lines_of(any_client, done.output_file_id),
        lines_of(any_client, done.error_file_id),
    )
    assert len({found["custom_id"] for found in [*output, *errors]}) == 400
    assert {found["error"]["code"] for found in errors} == {"batch_cancelled"}
    assert any_client.batches.cancel(batch.id).status == "cancelled"


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.chaos)])
def test_a_batch_survives_kills_with_one_result_for_each_line(client, tmp_path, kills):
    """All processes are killed in the middle; no line is lost, or there twice."""
    total = 150 * kills
    lines = [line(i, max_tokens=24) for i in range(total)]
    lines[3]["body"]["max_tokens"] = -1
    environ = {"NANOGPT_JOBS_PATH": str(tmp_path / "jobs"), "NANOGPT_JOBS_MAX_BATCH_CHOICES": "16"}
    batch_id, counts = "", []
    for attempt in range(kills + 1):
        with serving(environ=environ) as server:
            mine = server.client()
            if not batch_id:
                batch_id = start_batch(mine, upload(mine, lines)).id
            if attempt == kills:
                done = poll_batch(mine, batch_id)
                output = lines_of(mine, done.output_file_id)
                errors = lines_of(mine, done.error_file_id)
                break
            before = counts[-1] if counts else 0
            while mine.batches.retrieve(batch_id).request_counts.completed <= before + 10:
                time.sleep(0.02)
            counts.append(mine.batches.retrieve(batch_id).request_counts.completed)
            kill_all(server)
    assert counts == sorted(set(counts))
    assert counts[-1] < total - 1
    assert done.status == "completed", done
    assert (done.request_counts.completed, done.request_counts.failed) == (total - 1, 1)
    assert sorted(found["custom_id"] for found in [*output, *errors]) == sorted(
        found["custom_id"] for found in lines
    )
    # Lines without a seed draw one from the batch and their number, so a line that was run again
    # is not told from one that was not: all have their text.
    assert all(len(found["response"]["body"]["choices"][0]["text"]) == 24 for found in output)


def test_foreground_goes_first(server, client):
    """A batch that fills the engines does not hold up a request: it is done first."""
    batch = start_batch(client, upload(client, [line(i, max_tokens=200) for i in range(300)]))
    poll_batch(client, batch.id, "in_progress")
    assert create(client, max_tokens=30).choices[0].text
    running = client.batches.retrieve(batch.id)
    assert running.status == "in_progress"
    assert running.request_counts.completed < 300
    client.batches.cancel(batch.id)
    poll_batch(client, batch.id)


def test_the_front_end_alone_killed(server, client):
    """Its successor finds the work where the other one left it."""
    want = create(client, max_tokens=240).choices[0].text
    accepted = create(client, max_tokens=240, background=True)
    next(iter(stream_of(client, accepted.id)))
    starts = sum(line.startswith("ready: ") for line in server.output.splitlines())
    for process in server.below():
        if any(c.endswith("frontend.py") for c in process.cmdline()[:3]):
            process.send_signal(signal.SIGKILL)
    server.wait_for("^ready: ", count=starts + 1)
    assert poll(client, accepted.id).choices[0].text == want
