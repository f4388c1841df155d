"""The application: routes, headers, errors, streams; and the real gunicorn with real clients."""

import contextlib
import http.client
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import psutil
import pytest

from nanogpt import __version__
from nanogpt.api.openapi import OPERATIONS
from nanogpt.config import HttpConfig
from nanogpt.errors import Unavailable
from tests.app_utils import NAME, assert_error, complete, make_app
from tests.fake_cluster import INFO, FakeCluster, Status, fail_after, play
from tests.jobs_utils import jobs_app

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cluster():
    return FakeCluster()


@pytest.fixture
def client(cluster):
    return make_app(cluster).test_client()


def events(response) -> list:
    *parts, rest = response.get_data(as_text=True).split("\n\n")
    assert rest == ""
    return [part if part.startswith(":") else json.loads(part[6:]) for part in parts[:-1]] + [
        parts[-1]
    ]


# Completions


def test_completion(client):
    response = complete(client, n=3, max_tokens=4)
    assert response.status_code == 200
    assert response.headers["x-nanogpt-ranks"] == "0,1,0"
    body = response.json
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", body.pop("id"))
    fingerprint = body.pop("system_fingerprint")
    assert fingerprint == f"fp_{INFO.fingerprint}_{__version__}"
    choice = {"text": "hell", "logprobs": None, "finish_reason": "length"}
    assert body == {
        "object": "text_completion",
        "created": 1234,
        "model": NAME,
        "choices": [{"index": i, **choice} for i in range(3)],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 12,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_ranks_of_best_of_are_those_of_the_returned_choices(cluster, client):
    cluster.script = play([b"g", b"a"])  # 103 % 7 = 5, 97 % 7 = 6: the first is better
    assert complete(client, best_of=2).headers["x-nanogpt-ranks"] == "0"
    cluster.script = play([b"a", b"g"])
    assert complete(client, best_of=2).headers["x-nanogpt-ranks"] == "1"


def test_stream(client):
    response = complete(client, stream=True, n=2, max_tokens=3)
    assert response.content_type == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["x-nanogpt-ranks"] == "0,1"
    *chunks, done = events(response)
    assert done == "data: [DONE]"
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert all(len(c["choices"]) == 1 for c in chunks)
    texts = [
        "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i)
        for i in range(2)
    ]
    assert texts == ["hel", "hel"]


def test_stop_string_cancels_the_choice_in_the_engine(cluster, client):
    response = complete(client, stop="lo", n=2, max_tokens=30)
    assert [c["text"] for c in response.json["choices"]] == ["hel", "hel"]
    assert cluster.handles[0].cancelled == [0, 1]


def test_a_failure_is_a_500_or_an_event(cluster, client):
    cluster.script = fail_after(2, cluster.script)
    assert_error(complete(client), 500, "server_error")
    *chunks, last = events(complete(client, stream=True))
    assert [c["choices"][0]["text"] for c in chunks] == ["h", "e"]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert [handle.cancelled for handle in cluster.handles] == [[None], [None]]


def test_an_unexpected_error_says_nothing_of_its_inside(cluster, client, caplog):
    def broken(request):
        raise RuntimeError("secret path")

    cluster.script = broken
    response = complete(client)
    assert_error(response, 500, "server_error")
    assert "secret" not in response.get_data(as_text=True)
    assert "secret path" in caplog.text


def test_an_unexpected_error_in_a_stream_is_an_event(cluster, client, caplog):
    good = cluster.script
    cluster.script = lambda request: [*good(request)[:1], ["not an event"]]
    *_, last = events(complete(client, stream=True))
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "AttributeError" in caplog.text


@pytest.mark.parametrize("code", ["overloaded", "draining", "starting"])
def test_refused_admission(cluster, client, code):
    cluster.refusal = Unavailable("not now; try again", code=code, retry_after=7)
    for stream in (False, True):
        response = complete(client, stream=stream)
        assert_error(response, 503, "server_error", code)
        assert response.headers["Retry-After"] == "7"


def test_places_are_limited_and_given_back(cluster):
    """Threads are left for everything else; a refused or finished request holds none."""
    client = make_app(cluster, HttpConfig(threads=4)).test_client()
    body = {"model": NAME, "stream": True}
    streams = [client.post("/v1/completions", json=body, buffered=False) for _ in range(3)]
    response = complete(client)
    assert_error(response, 503, "server_error", "overloaded")
    assert "Retry-After" in response.headers
    assert client.get("/health").status_code == 200
    streams.pop().close()
    for _ in range(5):
        assert complete(client).status_code == 200
    cluster.refusal = Unavailable("not now")
    for _ in range(5):
        complete(client)
    cluster.refusal = None
    assert complete(client).status_code == 200
    for stream in streams:
        stream.close()


def test_starting(cluster, client):
    cluster.infos = {}
    assert_error(complete(client), 503, "server_error", "starting")
    assert_error(client.get("/v1/models/x"), 503, "server_error", "starting")
    assert client.get("/v1/models").json == {"object": "list", "data": []}
    assert_error(client.get("/tokenizer_info"), 503, "server_error", "starting")


def test_bad_requests(client):
    assert_error(complete(client, n=0), 400, param="n")
    assert_error(complete(client, model="no"), 404, code="model_not_found", param="model")
    response = complete(client, max_tokens=1000)
    assert_error(response, 400, code="context_length_exceeded", param="max_tokens")
    assert_error(client.post("/v1/completions", data="x"), 415)
    assert_error(client.post("/v1/completions", data="{", content_type="application/json"), 400)


def test_a_long_name_in_an_inner_object_is_not_repeated(client):
    response = complete(client, stream=True, stream_options={"x" * 5000: True})
    assert_error(response, 400, param="stream_options")
    assert len(response.json["error"]["message"]) < 600


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity", "x" * 1000])
def test_an_encoded_body_is_refused_as_such(client, encoding):
    """Its header was ignored, and the body was malformed JSON, or none at all."""
    response = complete(client, headers={"Content-Encoding": encoding})
    assert_error(response, 415)
    assert "send the body as it is" in response.json["error"]["message"]
    assert len(response.json["error"]["message"]) < 200
    assert complete(client, headers={"Content-Encoding": "identity"}).status_code == 200


def test_a_websocket_is_told_what_there_is_instead(client):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    response = client.get("/v1/models", headers=headers)
    assert_error(response, 400)
    assert "stream" in response.json["error"]["message"]


def test_body_limit(cluster):
    client = make_app(cluster, HttpConfig(max_body_mib=1)).test_client()
    response = complete(client, prompt="x" * 2**20)
    assert_error(response, 413)
    assert "1 MiB" in response.json["error"]["message"]


# Routes and headers


def test_models(client):
    (listed,) = client.get("/v1/models").json["data"]
    assert listed == client.get(f"/v1/models/{NAME}").json
    assert (listed["id"], listed["object"], listed["context_length"]) == (NAME, "model", 64)
    assert (listed["state"], listed["aliases"]) == ("loaded", ["fake", "fake/old-name"])
    assert_error(client.get("/v1/models/a/b"), 404, code="model_not_found", param="model")


def test_tokenize_and_back(client):
    body = {"prompt": "the né", "add_special_tokens": False, "return_token_strs": True}
    answer = client.post("/tokenize", json=body).json
    assert answer == {
        "count": 3,
        "max_model_len": 64,
        "tokens": [257, 32, 264],
        "token_strs": ["the", " ", "né"],
    }
    assert client.post("/detokenize", json={"tokens": [257, 32, 264]}).json == {"prompt": "the né"}
    assert client.post("/tokenize", json={"prompt": ""}).json["tokens"] == []
    assert_error(client.post("/detokenize", json={"tokens": [999]}), 400, param="tokens")
    assert_error(client.post("/tokenize", json={}), 400, param="prompt")
    assert_error(client.post("/tokenize", data="x"), 415)


def test_tokenizer_info_is_what_lm_eval_reads(client):
    """Its remote tokenizer asks for eos_token, and takes the first token of its encoding as id."""
    info = client.get("/tokenizer_info").json
    assert info["eos_token"] == "<|endoftext|>"
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert client.post("/tokenize", json=body).json["tokens"] == [INFO.eos_token_id]


def test_several_models_need_a_name(cluster, client):
    cluster.infos = {NAME: INFO, "other": INFO}
    assert_error(client.get("/tokenizer_info"), 400, param="model")
    assert client.get(f"/tokenizer_info?model={NAME}").status_code == 200


def test_health_and_ready(cluster, client):
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json["ready"] is True
    cluster.state = Status(ready=False, detail="1 of 2 ranks have joined")
    response = client.get("/ready")
    assert response.status_code == 503
    assert response.json["detail"] == "1 of 2 ranks have joined"
    assert client.get("/health").status_code == 200


def test_metrics(client):
    complete(client, n=2, max_tokens=3)
    complete(client, n=0)
    text = client.get("/metrics").get_data(as_text=True)
    for line in (
        'nanogpt_http_requests_total{route="/v1/completions",status="200"} 1.0',
        'nanogpt_http_requests_total{route="/v1/completions",status="400"} 1.0',
        f'nanogpt_completion_tokens_total{{model="{NAME}"}} 6.0',
        f'nanogpt_prompt_tokens_total{{model="{NAME}"}} 2.0',
        f'nanogpt_choices_total{{finish_reason="length",model="{NAME}"}} 2.0',
        f'nanogpt_time_to_first_token_seconds_count{{model="{NAME}"}} 1.0',
        f'nanogpt_inter_token_seconds_count{{model="{NAME}"}} 4.0',
        f'nanogpt_request_seconds_count{{model="{NAME}"}} 1.0',
        "nanogpt_http_requests_in_progress 0.0",
        f'nanogpt_running{{model="{NAME}",rank="1"}} 2.0',
        f'nanogpt_waiting{{model="{NAME}",rank="0"}} 1.0',
        f'nanogpt_kv_usage_ratio{{model="{NAME}",rank="0"}} 0.25',
        f'nanogpt_engine_generated_tokens_total{{model="{NAME}",rank="0"}} 99.0',
        "nanogpt_ranks 2.0",
        "nanogpt_epoch 3.0",
    ):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/", "//v1/completions", "/V1/models"])
def test_not_found(client, path):
    assert_error(client.get(path), 404, code="not_found")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_long_path_is_not_repeated(client, method):
    for path in (f"/{'x' * 5000}", f"/v1/models/{'x' * 5000}"):
        message = client.open(path, method=method).json["error"]["message"]
        assert len(message) < 400
        assert "x" * 201 not in message


def test_method_not_allowed(client):
    response = client.get("/v1/completions")
    assert_error(response, 405)
    assert "POST" in response.headers["Allow"]
    assert_error(client.delete("/v1/models"), 405)


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/metrics", "/docs"])
def test_head_is_get_without_a_body(client, path):
    get, head = client.get(path), client.head(path)
    assert head.data == b""
    assert (head.status_code, head.content_type) == (get.status_code, get.content_type)


@pytest.mark.parametrize("path", ["/health", "/nope", "/v1/models/x", "/v1/completions"])
def test_headers_on_every_answer(client, path):
    response = client.get(path, headers={"x-request-id": "my-id_1.2"})
    assert response.headers["x-request-id"] == "my-id_1.2"
    assert response.headers["openai-processing-ms"].isdigit()


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "é", "a;b"])
def test_an_odd_request_id_is_replaced(client, given):
    response = client.get("/health", headers={"x-request-id": given})
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


def test_cors_is_off_by_default(client):
    response = client.options("/v1/completions", headers={"Origin": "https://a.example"})
    assert response.status_code == 200
    assert not [name for name, _ in response.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(("origins", "allowed"), [(("https://a.example",), False), (("*",), True)])
def test_cors_for_listed_origins(cluster, origins, allowed):
    client = make_app(cluster, HttpConfig(cors_origins=origins)).test_client()
    preflight = client.options(
        "/v1/completions",
        headers={
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        },
    )
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
    response = complete(client, headers={"Origin": "https://a.example"})
    assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
    other = complete(client, headers={"Origin": "https://b.example"})
    assert ("Access-Control-Allow-Origin" in other.headers) == allowed
    assert "Origin" in other.headers["Vary"]


# The contract as OpenAPI


def test_openapi_lists_every_route(tmp_path):
    rules = set()
    with jobs_app(tmp_path) as app:
        found = list(app.url_map.iter_rules())
    for rule in found:
        path = rule.rule.replace("<path:name>", "{id}")
        path = re.sub(r"<(?:any_text:)?(\w+)>", r"{\1}", path)
        rules |= {(method, path) for method in rule.methods - {"HEAD", "OPTIONS"}}
    assert rules == {(o.method.upper(), o.path) for o in OPERATIONS}


def test_openapi_document(client):
    document = client.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    fields = document["components"]["schemas"]["CompletionRequest"]
    assert fields["required"] == ["model"]
    assert fields["additionalProperties"] is False
    for name, field in fields["properties"].items():
        assert ({"type": "null"} in field.get("anyOf", [])) == (name != "model")
    top_p = fields["properties"]["top_p"]
    assert top_p["default"] == 1.0
    assert top_p["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_docs_page_stands_alone(client):
    response = client.get("/docs")
    page = response.get_data(as_text=True)
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"<script|https?://|src=", page)
    for operation in OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}" in page
    assert "repetition_penalty" in page


# Clients that leave


def serve_one(cluster, client, **fields):
    """Ask on a socket pair whose other end closes after the first second without events."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        return client.post(
            "/v1/completions",
            json={"model": NAME, "prompt": "hi", "max_tokens": 50, **fields},
            environ_overrides={"gunicorn.socket": ours},
        ).get_data()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_cancels(cluster, client, stream):
    good = cluster.script
    cluster.script = lambda request: good(request)[:2]  # and then nothing
    serve_one(cluster, client, stream=stream)
    assert cluster.handles[0].cancelled == [None]
    assert "nanogpt_requests_cancelled_total" in client.get("/metrics").get_data(as_text=True)


def test_a_stream_that_is_never_read_is_cancelled_when_it_is_closed(cluster, client):
    response = client.post("/v1/completions", json={"model": NAME, "stream": True}, buffered=False)
    response.close()
    assert cluster.handles[0].cancelled == [None]


def test_an_idle_stream_is_pinged(cluster, client):
    good = cluster.script

    def slow(request):
        batches = good(request)
        return [batches[0], [], *batches[1:]]  # an empty batch is what a timeout looks like

    cluster.script = slow
    got = events(complete(client, stream=True))
    assert got.count(": ping") == 1
    assert got[1] == ": ping"


# The real server: gunicorn, sockets, the official client

SERVER = """
import sys
import msgspec
from nanogpt import log
from nanogpt.api import listener, server
from nanogpt.config import HttpConfig
from tests.app_utils import make_app
from tests.fake_cluster import INFO, FakeCluster, play

settings = HttpConfig(threads=8, drain_s=float(sys.argv[2]))

def app():
    info = msgspec.structs.replace(INFO, context_length=10**6)
    cluster = FakeCluster(play([b"hello " * int(sys.argv[3])]), infos=[info])
    cluster.delay_s = float(sys.argv[1])
    return make_app(cluster, settings)

log.set_up("info", "front end")
listener.RECEIVE_TIMEOUT_S, listener.SEND_TIMEOUT_S = 0.5, 1.0
server.REQUEST_S, server.PATIENCE_S, server.LINGER_S = float(sys.argv[4]), 0.3, 60.0
socket = listener.listen("127.0.0.1", 0)
print(socket.getsockname()[1], flush=True)
server.serve(socket, app, settings)
"""


class Running:
    def __init__(self, *arguments: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.process.stdout.readline())
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.output.append(line)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=30
        )

    def wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for line in list(self.output):
                if re.search(pattern, line):
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.output}")

    def talk(self, raw: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(raw)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return answer

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def running(delay_s=0.0, drain_s=5.0, words=10, request_s=1.5):
    server = Running(delay_s, drain_s, words, request_s)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end()


@pytest.fixture(scope="module")
def server():
    with running(delay_s=0.02) as server:
        yield server


def test_official_client(server):
    client = server.client()
    answer = client.completions.create(model=NAME, prompt="hi", max_tokens=5, n=2)
    assert [c.text for c in answer.choices] == ["hello", "hello"]
    chunks = list(client.completions.create(model=NAME, prompt="hi", max_tokens=5, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "hello"
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt="hi", temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="no", prompt="hi")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_work(server, stream):
    body = json.dumps({"model": NAME, "prompt": "hi", "max_tokens": 60, "stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    name = f"leaving-{stream}"
    connection.request(
        "POST",
        "/v1/completions",
        body,
        {"Content-Type": "application/json", "x-request-id": name},
    )
    if stream:
        connection.getresponse().fp.readline()
    connection.close()
    line = server.wait_for(f"request_id={name}")
    assert "finish=cancelled:1" in line


CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 20000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: odd\r\n\r\n", 501),
        (CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"2\r\n{}XX0\r\n\r\n", 400),
        (CHUNKED + b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", 400),
    ],
    ids=range(10),
)
def test_malformed_http_is_answered_in_json(server, raw, status):
    """A chunk that is none was a 500, and a traceback in the log."""
    head, _, body = server.talk(raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/json" in head.lower()
    assert b"x-request-id: req_" in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_too_large_a_body_is_refused(server):
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    answer = server.talk(head + b"Connection: close\r\nContent-Length: 9000000\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    answer = server.talk(
        head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 9 + b"0\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_stalls_is_not_waited_for(server):
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    assert server.talk(head) == b""
    server.wait_for("a client that stalled")
    answer = server.talk(head + b"Content-Length: 100\r\nConnection: close\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_request_that_trickles_in_is_not_waited_for(server):
    """A byte now and then kept a thread for ever: a timeout of each read alone never ran out."""
    for head in (b"GET /health HTTP/1.1\r\n", CHUNKED):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"X: 1\r\n" if head.startswith(b"GET") else b"1\r\n \r\n")
                    if select.select([connection], [], [], 0.1)[0]:
                        break
                else:
                    pytest.fail("it was waited for")


def test_slow_clients_give_their_threads_to_others():
    """As many clients as there are threads, each with a byte of its request now and then, and
    nobody else was answered."""
    with running(request_s=600.0) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        slow = [stack.enter_context(socket.create_connection(address)) for _ in range(8)]
        for number, connection in enumerate(slow):
            connection.sendall(b"GET /health HTTP/1.1\r\n" if number % 2 else CHUNKED)
        ended = threading.Event()

        def trickle():
            while not ended.wait(0.1):
                for number, connection in enumerate(slow):
                    with contextlib.suppress(OSError):
                        connection.sendall(b"X: 1\r\n" if number % 2 else b"1\r\n \r\n")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            answer = server.talk(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        finally:
            ended.set()
            thread.join()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert server.wait_for("closing connections of slow clients")


def test_whoever_keeps_its_end_open_keeps_nobody_waiting(server):
    """The main thread waited up to two seconds for each client that had asked for the end of
    the connection and did not close its side, and accepted nobody meanwhile."""
    ask = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            connections.append(stack.enter_context(connection))
            connection.sendall(ask)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert server.talk(ask).startswith(b"HTTP/1.1 200 ")
        for _ in range(2):  # a closed connection would answer the first with a reset
            for connection in connections:
                connection.sendall(b"x")
            time.sleep(0.05)


def test_no_peer_speaks_for_another(server):
    """Whoever came from 127.0.0.1, so all clients of a proxy there, could set SCRIPT_NAME."""
    head = b"GET /x/health HTTP/1.1\r\nSCRIPT_NAME: /x\r\nConnection: close\r\n\r\n"
    assert server.talk(head).startswith(b"HTTP/1.1 404 ")


def test_a_client_that_does_not_read_is_cancelled():
    """Its socket's buffers fill up, and then no thread waits for it for ever."""
    with running(words=20_000) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        fields = {"model": NAME, "prompt": "hi", "max_tokens": 50_000, "stream": True}
        body = json.dumps({**fields, "logprobs": 5})  # megabytes, even when put together
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert "finish=cancelled:1" in server.wait_for("POST /v1/completions")


def test_a_killed_worker_is_replaced_on_the_same_socket():
    with running() as server:
        client = server.client()
        assert client.models.retrieve(NAME)  # now the worker is there
        (worker,) = psutil.Process(server.process.pid).children()
        worker.kill()
        worker.wait(10)
        answer = client.completions.create(model=NAME, prompt="hi", max_tokens=5)
        assert answer.choices[0].text == "hello"


def test_sigterm_lets_streams_finish():
    with running(delay_s=0.02) as server:
        stream = server.client().completions.create(
            model=NAME, prompt="hi", max_tokens=60, stream=True
        )
        first = next(iter(stream))
        ended = threading.Thread(target=server.end)
        ended.start()
        texts = [first.choices[0].text, *(c.choices[0].text for c in stream)]
        ended.join()
        assert "".join(texts) == "hello " * 10
        assert server.process.returncode == 0


def test_a_stream_that_outlasts_the_drain_gets_an_error():
    with running(delay_s=0.2, drain_s=0.5) as server:
        stream = server.client().completions.create(
            model=NAME, prompt="hi", max_tokens=60, stream=True
        )
        next(iter(stream))
        ended = threading.Thread(target=server.end)
        ended.start()
        with pytest.raises(openai.APIError, match="shut down"):
            list(stream)
        ended.join()
        assert server.process.returncode == 0
