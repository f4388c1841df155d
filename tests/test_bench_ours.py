"""Benchmarks of our own parts: the front end with a generator of tokens, and scaling."""

import json
import time

import pytest

from nanogpt.bench import scaling
from nanogpt.bench.__main__ import main
from nanogpt.bench.fake_rank import MODEL, TokenGenerator
from nanogpt.bench.stamps import CHARACTERS, COUNT, UNIT_S, age_s, now_id
from nanogpt.bench.stats import Rate
from nanogpt.request import GenerateRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.tokenizer import load_tokenizer

# Times as characters


def test_a_token_tells_its_age():
    now = 12_345.678
    character = CHARACTERS[int(now / UNIT_S) % COUNT]
    assert age_s(character, now) == 0
    assert age_s(character, now + 0.25) == pytest.approx(0.25, abs=UNIT_S)
    assert age_s(character, now + 9.5) == pytest.approx(9.5, abs=UNIT_S)


def test_tokens_are_the_tokenizers():
    tokenizer = load_tokenizer(MODEL.tokenizer)
    token_id = now_id()
    assert 0 <= age_s(tokenizer.decode([token_id]), time.monotonic()) < 5
    assert len(set(CHARACTERS)) == COUNT


# The generator


def request(request_id="r", max_tokens=2, **changes):
    return GenerateRequest(
        request_id=request_id,
        model=MODEL.name,
        prompts=((1,),),
        n=3,
        params=SamplingParams(seed=0, max_tokens=max_tokens),
        **changes,
    )


def test_the_generator_gives_every_choice_its_tokens():
    generator = TokenGenerator(0)
    generator.add(request(finished=(1,)))
    first, second = generator.step(), generator.step()
    assert [(e.index, e.position, e.finish_reason) for e in first] == [(0, 0, None), (2, 0, None)]
    assert [(e.index, e.position, e.finish_reason) for e in second] == [
        (0, 1, "length"),
        (2, 1, "length"),
    ]
    assert not generator.has_work
    assert generator.stats().generated_tokens == 4


def test_the_generator_forgets_what_is_cancelled():
    generator = TokenGenerator(0)
    generator.add(request(max_tokens=9))
    generator.abort("r", 1)
    assert [e.index for e in generator.step()] == [0, 2]
    generator.abort("r")
    generator.abort("unknown")
    assert not generator.has_work


# The commands


def test_front_end(capsys, tmp_path):
    plot = tmp_path / "p.png"
    argv = ["frontend", "--streams", "5", "--rate", "50", "--seconds", "0.5", "--requests", "3"]
    assert main([*argv, "--n", "2", "--output-len", "10", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "lag p50 ms" in out
    whole, streams = json.loads(out.splitlines()[-1])["results"]
    assert whole["tokens"] == 3 * 2 * 10
    assert whole["lag_ms"] is None
    assert streams["wanted_per_s"] == 250
    assert streams["tokens"] > 20
    assert streams["lag_ms"]["count"] == streams["tokens"]
    assert streams["front_end_cpu"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_scaling_of_a_running_server(server, capsys, tmp_path):
    plot = tmp_path / "p.png"
    argv = ["scaling", "--url", f"{server.url}/v1", "--n", "1,3", "--output-len", "4"]
    assert main([*argv, "--rounds", "2", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    points = json.loads(out.splitlines()[-1])["results"]
    assert [(p["ranks"], p["n"]) for p in points] == [(None, 1), (None, 3)]
    assert points[1]["tokens_per_s"]["median"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_speedups_are_against_the_first_number_of_ranks():
    found = {
        1: {1: Rate(10, 9, 11), 4: Rate(20, 19, 21)},
        2: {1: Rate(5, 5, 5), 4: Rate(30, 30, 30)},
    }
    points = scaling._points(found)
    assert [p.speedup for p in points] == [1, 1, 0.5, 1.5]
    assert "x 1.50" in scaling._table(points)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("scaling",), "--url"),
        (("scaling", "--url", "http://h/v1", "--launch", ""), "--url"),
        (("scaling", "--url", "http://h/v1", "--n", "129"), "at most 128"),
        (("scaling", "--launch", "--model no-such"), "unknown model 'no-such'"),
        (("frontend", "--streams", "0"), "out of range"),
        (("switching", "--url", "http://h/v1"), "--models"),
        (("switching", "--url", "http://h/v1", "--models", "a,a"), "two or more different"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
