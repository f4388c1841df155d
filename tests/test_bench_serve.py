"""The load generator: its arithmetic, its HTTP, its command line, and a real run."""

import asyncio
import contextlib
import itertools
import json
import threading

import pytest

from nanogpt.bench import options
from nanogpt.bench.__main__ import main
from nanogpt.bench.connection import ConnectionLost, Url, _Chunked, request
from nanogpt.bench.load import Round, run_round
from nanogpt.bench.outcome import Outcome, Recorder
from nanogpt.bench.serve import describe
from nanogpt.bench.stats import Limit, Rate, Spread, percentile, report
from nanogpt.bench.table import table
from nanogpt.bench.target import Target, find_target
from nanogpt.bench.workload import PRESETS, Lengths, Workload, bodies
from nanogpt.errors import ConfigError, StartupError

# Statistics


def test_percentiles_interpolate_between_neighbours():
    assert [percentile([1.0, 2.0, 4.0], p) for p in (0, 25, 50, 75, 100)] == [1, 1.5, 2, 3, 4]
    assert percentile([7.0], 99) == 7


def test_spread_of_nothing_is_none():
    assert Spread.of([]) is None
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(3, 2.0, 2.0, 2.9, 2.98, 3.0)


def outcome(**changes):
    defaults = {
        "started": 10.0,
        "ended": 11.0,
        "status": 200,
        "arrivals": {0: [10.2, 10.4, 10.9]},
        "output_tokens": 8,
        "prompt_tokens": 5,
    }
    return Outcome(**{**defaults, **changes})


def test_times_of_a_request():
    one = outcome()
    assert one.ttft_s == pytest.approx(0.2)
    assert one.tpot_s == pytest.approx(0.7 / 7)  # by tokens, not by chunks
    assert one.gaps_s() == pytest.approx([0.2, 0.5])
    assert one.e2e_s == 1.0


def test_choices_run_side_by_side():
    """Gaps are within a choice; the tokens of one choice are those of the request over n."""
    one = outcome(arrivals={0: [10.2, 10.6], 1: [10.3, 10.7]}, n=2)
    assert one.gaps_s() == pytest.approx([0.4, 0.4])
    assert one.tpot_s == pytest.approx(0.5 / 3)


def test_a_whole_answer_has_no_first_token():
    one = outcome(arrivals={})
    assert one.ttft_s is None
    assert one.tpot_s is None


def test_report_counts_errors_by_status():
    bad = outcome(status=503, error="full", output_tokens=0, arrivals={})
    lost = outcome(status=0, error="gone", output_tokens=0, arrivals={})
    rounds = [
        Round(outcomes=[outcome(), bad], seconds=2.0, client_cpu=0.1),
        Round(outcomes=[outcome(), lost], seconds=4.0, client_cpu=0.9),
    ]
    found = report("W", rounds, [Limit.parse("ttft=500")])
    assert found.errors == {"503": 1, "no answer": 1}
    assert found.output_tokens == 16
    assert found.output_tokens_per_s == Rate(3.0, 2.0, 4.0)
    assert found.goodput.share == 0.5
    assert found.goodput.requests_per_s == pytest.approx(2 / 6)
    text = describe(found)
    assert "2 of 4 requests" in text
    assert "full" in text
    assert "90% of one core (too busy" in text


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        *(("ttft=200.1", True), ("ttft=199", False), ("tpot=101", True), ("tpot=99", False)),
        *(("itl=501", True), ("itl=499", False), ("e2e=1000", True), ("e2e=999", False)),
    ],
)
def test_limits(limit, kept):
    assert Limit.parse(limit).kept_by(outcome()) is kept


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "speed=3", "=3"])
def test_bad_limits_are_refused(text):
    with pytest.raises(ConfigError, match="milliseconds"):
        Limit.parse(text)


def test_table_aligns_numbers():
    assert table(["a", "b"], [["x", 1234.5], ["long", None]]).splitlines() == [
        "a         b",
        "----  -----",
        "x     1,234",
        "long      -",
    ]


# Workloads


def test_lengths():
    assert Lengths.parse("128") == Lengths(128, 128)
    assert Lengths.parse("uniform:2:9") == Lengths(2, 9)
    for bad in ("0", "x", "uniform:9:2", "uniform:3", "normal:1:2", ""):
        with pytest.raises(ConfigError):
            Lengths.parse(bad)


def drawn(workload, seed=0, count=20):
    return [json.loads(b) for b in itertools.islice(bodies(workload, "m", 65, seed), count)]


def test_requests_are_the_same_for_the_same_seed():
    workload = Workload(concurrency=1, requests=1, prompt=Lengths(4, 9), output=Lengths(1, 5))
    assert drawn(workload) == drawn(workload)
    assert drawn(workload) != drawn(workload, seed=1)


def test_requests_have_the_lengths_asked_for():
    workload = Workload(
        requests=1, prompt=Lengths(6, 9), output=Lengths(1, 5), shared_prefix=5, n=3
    )
    made = drawn(workload)
    assert {len(r["prompt"]) for r in made} == {6, 7, 8, 9}
    assert {r["max_tokens"] for r in made} == {1, 2, 3, 4, 5}
    assert len({tuple(r["prompt"][:5]) for r in made}) == 1
    assert len({tuple(r["prompt"][5:]) for r in made}) > 15
    assert all(0 <= t < 65 for r in made for t in r["prompt"])
    assert made[0]["n"] == 3


def test_fields_are_sent_only_when_asked_for():
    plain = Workload(requests=1)
    assert set(drawn(plain)[0]) == {
        *("model", "n", "temperature", "stream", "stream_options", "prompt", "max_tokens")
    }
    other = Workload(requests=1, stream=False, ignore_eos=True, sampling_seed=5)
    one = drawn(other)[0]
    assert "stream" not in one
    assert one["ignore_eos"] is True
    assert one["seed"] == 5


def test_text_prompts_are_words():
    one = drawn(Workload(requests=1, prompt_kind="text", prompt=Lengths(7, 7)))[0]
    assert isinstance(one["prompt"], str)
    assert len(one["prompt"].split()) == 7


def test_a_shared_prefix_fits_every_prompt():
    with pytest.raises(ConfigError, match="shared prefix"):
        Workload(requests=1, prompt=Lengths(4, 9), shared_prefix=5)


def parsed(*argv):
    parser = options.Parser()
    options.add_load_options(parser)
    return options.workloads(parser.parse_args(argv))


def test_presets():
    assert parsed("--workload", "W4,w5") == [PRESETS["W4"], PRESETS["W5"]]
    assert PRESETS["W3"].burst == 32
    assert (PRESETS["W4"].n, PRESETS["W4"].prompt.low) == (16, 256)


def test_load_options():
    (one,) = parsed("--concurrency", "4")
    assert (one.concurrency, one.requests) == (4, 40)
    (one,) = parsed("--rate", "2.5", "--duration", "3")
    assert (one.concurrency, one.rate, one.requests, one.duration_s) == (None, 2.5, None, 3)
    with pytest.raises(ConfigError, match="leave the option for output"):
        parsed("--workload", "W1", "--output-len", "3")


# HTTP


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_chunks_in_any_pieces(size):
    raw = b"5\r\nhello\r\n1;ext=1\r\n!\r\nc\r\n\r\nline\r\nline\r\n0\r\n\r\n"
    chunked, text = _Chunked(), b""
    for at in range(0, len(raw), size):
        assert not chunked.complete or raw[at:] in (b"\r\n", b"\n")
        text += chunked.feed(raw[at : at + size])
    assert text == b"hello!\r\nline\r\nline"
    assert chunked.complete


def test_urls():
    assert str(Url.parse("http://h:1/v1/")) == "http://h:1/v1"
    assert str(Url.parse("https://h")) == "https://h:443/v1"
    assert str(Url.parse("http://[::1]:8000/v1")) == "http://[::1]:8000/v1"
    for bad in ("h:1", "ftp://h", "http://", "http://h:x"):
        with pytest.raises(ConfigError):
            Url.parse(bad)


@contextlib.contextmanager
def answering(*answers: bytes, pieces: int = 7):
    """A server that gives each connection the next of these raw answers, in small pieces."""
    left = iter(answers)
    ready, loop = threading.Event(), asyncio.new_event_loop()
    port = 0

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        raw = next(left)
        for at in range(0, len(raw), pieces):
            writer.write(raw[at : at + pieces])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def start():
        nonlocal port
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        ready.set()
        return server

    server = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    ready.wait()
    yield f"http://127.0.0.1:{port}/v1"

    async def stop():
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def response(body: bytes, kind="application/json", status="200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream(*events: bytes) -> bytes:
    body = b"".join(b"data: " + event + b"\n\n" for event in events)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body


def chunk(text: str, index=0, **fields) -> bytes:
    return json.dumps({"choices": [{"index": index, "text": text}], **fields}).encode()


USAGE = b'{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":9,"total_tokens":13}}'


def asked(raw: bytes, **changes) -> Outcome:
    workload = Workload(concurrency=1, requests=1, **changes)
    with answering(raw) as url:
        target = Target(name="t", url=Url.parse(url), model="m", timeout_s=10)
        (one,) = run_round(target, workload, seed=0).outcomes
    return one


def test_tokens_are_counted_by_usage_where_there_is_one():
    one = asked(stream(chunk("a"), chunk("bc"), USAGE, b"[DONE]"))
    assert one.ok
    assert (one.output_tokens, one.counted_by, one.prompt_tokens) == (9, "usage", 4)
    assert len(one.arrivals[0]) == 2


def test_tokens_are_counted_by_chunks_where_there_is_no_usage():
    one = asked(stream(chunk("a"), chunk("", 1), chunk("b", 1), b"[DONE]"), n=2)
    assert (one.output_tokens, one.counted_by) == (2, "chunks")
    assert set(one.arrivals) == {0, 1}


def test_an_end_without_text_is_the_first_token():
    end = b'{"choices":[{"index":0,"text":"","finish_reason":"length"}]}'
    one = asked(stream(end, USAGE, b"[DONE]"))
    assert one.ttft_s is not None


def test_a_whole_answer():
    body = {"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}
    one = asked(response(json.dumps(body).encode()), stream=False)
    assert (one.ok, one.output_tokens, one.arrivals) == (True, 3, {})


@pytest.mark.parametrize(
    ("raw", "status", "error"),
    [
        (response(b'{"error":{"message":"full"}}', status="503 Busy"), 503, "full"),
        (response(b"oops", "text/plain", "500 Error"), 500, "oops"),
        (stream(chunk("a"), b'{"error":{"message":"broke"}}'), 200, "broke"),
        (stream(chunk("a")), 200, "without [DONE]"),
        (stream(b"{not json", b"[DONE]"), 200, "not a completion"),
        (response(b"x" * 50)[:-10], 0, "ended early"),
        (b"SSH-2.0-x\r\n\r\n", 0, "not HTTP"),
        (b"", 0, "ended early"),
    ],
)
def test_failures_are_told(raw, status, error):
    one = asked(raw)
    assert not one.ok
    assert one.status == status
    assert error in one.error


def test_a_server_that_is_silent_is_given_up():
    async def ask(port):
        url = Url.parse(f"http://127.0.0.1:{port}")
        await request(url, "GET", "/x", headers={}, timeout_s=0.05)

    async def main():
        release = asyncio.Event()

        async def silent(reader, writer):
            await release.wait()
            writer.close()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            with pytest.raises(ConnectionLost, match=r"within 0\.05 s"):
                await ask(server.sockets[0].getsockname()[1])
            release.set()

    asyncio.run(main())


def test_comments_of_a_stream_are_no_tokens():
    outcome = Outcome(started=0.0)
    recorder = Recorder(outcome)
    recorder.line(b": ping", 1.0)
    recorder.line(b"data: [DONE]", 2.0)
    recorder.end()
    assert (outcome.ok, outcome.arrivals, outcome.output_tokens) == (True, {}, 0)


# Finding the server


def models(*names, **fields):
    return response(json.dumps({"data": [{"id": n, **fields} for n in names]}).encode())


def test_the_only_model_needs_no_name():
    info = response(b'{"vocab_size":65}')
    with answering(models("m"), info) as url:
        target = find_target(url)
    assert (target.model, target.vocab_size) == ("m", 65)


def test_models_that_are_not_loaded_do_not_count():
    entries = [{"id": "a", "state": "available"}, {"id": "b", "state": "loaded"}]
    listed = response(json.dumps({"data": entries}).encode())
    with answering(listed, response(b'{"vocab_size":65}')) as url:
        assert find_target(url).model == "b"


def test_llama_server_tells_its_vocabulary():
    with answering(models("m", meta={"n_vocab": 77})) as url:
        assert find_target(url).vocab_size == 77


def test_a_vocabulary_that_nobody_tells_is_gpt2s():
    with answering(models("m"), response(b"{}", status="404 Not Found")) as url:
        assert find_target(url).vocab_size == 50257


@pytest.mark.parametrize(
    ("answer", "model", "message"),
    [
        (models("a", "b"), "", "--model; it has a, b"),
        (models("a"), "c", "has no model 'c'; it has a"),
        (response(b"{}", status="401 Unauthorized"), "", "--api-key"),
        (response(b"[]", status="404 Not Found"), "", "answers 404"),
        (response(b"<html>"), "", "not a list of models"),
    ],
)
def test_what_is_wrong_with_a_server_is_told(answer, model, message):
    with answering(answer) as url, pytest.raises(StartupError, match=message):
        find_target(url, model=model)


# The command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "COMMAND"),
        (("serve",), "--url"),
        (("serve", "--url", "http://127.0.0.1:1/v1"), "nobody answers"),
        (("serve", "--url", "nonsense"), "not a URL"),
        (("serve", "--url", "http://h/v1", "--concurency", "3"), "did you mean '--concurrency'"),
        (("serve", "--url", "http://h/v1", "--rate", "0"), "out of range"),
        (("serve", "--url", "http://h/v1", "--workload", "W9"), "unknown workload 'W9'"),
        (("serve", "--url", "http://h/v1", "--plot", "/no/such/p.png"), "no directory"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_serve_on_a_real_server(server, capsys, tmp_path):
    plot = tmp_path / "p.png"
    argv = ["serve", "--url", f"{server.url}/v1", "--concurrency", "3", "--requests", "6"]
    argv += ["--prompt-len", "uniform:4:20", "--output-len", "6", "--n", "2", "--rounds", "2"]
    assert main([*argv, "--goodput", "e2e=60000", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "time to first token" in out
    result = json.loads(out.splitlines()[-1])
    (found,) = result["results"]
    assert result["benchmark"] == "serve"
    assert result["machine"]["cores"] >= 1
    assert (found["requests"], found["failed"], found["output_tokens"]) == (12, 0, 12 * 2 * 6)
    assert found["counted_by"] == ["usage"]
    assert found["goodput"]["share"] == 1.0
    assert found["times_ms"]["ttft"]["count"] == 12
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_poisson_arrivals_on_a_real_server(server, capsys):
    argv = ["serve", "--url", f"{server.url}/v1", "--rate", "50", "--requests", "5"]
    assert main([*argv, "--output-len", "2", "--no-stream", "--prompt-kind", "text"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (found["requests"], found["output_tokens"]) == (5, 10)
    assert set(found["times_ms"]) == {"e2e"}


def test_a_workload_that_can_not_be_done_is_told(server, capsys):
    """The bundled model's context is 256 tokens."""
    assert main(["serve", "--url", f"{server.url}/v1", "--workload", "W5"]) == 2
    assert "can't do W5: 400: this model's context is 256" in capsys.readouterr().err
