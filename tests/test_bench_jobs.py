"""`python -m nanogpt.bench jobs`: what can be seen without servers."""

import json

import pytest

from nanogpt.bench.__main__ import main
from nanogpt.bench.job_serving import prompts


def test_stores_are_measured_and_the_last_line_is_json(capsys):
    options = ["--part", "stores", "--store", "sqlite", "--threads", "1,2", "--seconds", "0.1"]
    assert main(["jobs", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("store ")
    rows = json.loads(lines[-1])["results"]["stores"]
    assert [(row["store"], row["threads"]) for row in rows] == [("sqlite", 1), ("sqlite", 2)]
    assert all(row[name] > 0 for row in rows for name in ("puts", "gets", "done"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--store", "mysql"], "none of sqlite, redis, sqs"),
        (["--part", "calls", "--store", "sqlite"], "needs a queue"),
        (["--part", "speed"], "none of stores, calls, batch"),
    ],
)
def test_mistakes_are_one_line(capsys, options, words):
    assert main(["jobs", *options]) == 2
    assert words in capsys.readouterr().err


def test_lines_of_a_round_are_the_same_for_batch_and_engine():
    assert prompts(5, 1) == prompts(5, 1) != prompts(5, 2)
    assert len(set(prompts(100, 0))) == 100
