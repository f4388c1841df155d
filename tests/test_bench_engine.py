"""The engine's benchmark: its roofline, and a real sweep of the bundled model."""

import json

import pytest
import torch

from nanogpt.bench.__main__ import main
from nanogpt.bench.roofline import Roof, Shape, measure
from nanogpt.model.gpt import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=40, n_layer=3, n_head=2, n_embd=8)


def test_shape_counts_what_a_step_reads():
    model = GPT(CONFIG)
    shape = Shape.of(CONFIG, model.num_parameters(), item_bytes=2, kv_item_bytes=4)
    read = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    assert shape.weights == read
    assert shape.weight_bytes == 2 * read
    assert shape.kv_bytes == 2 * 3 * 8 * 4  # keys and values, layers, channels, bytes


def test_least_time_is_the_longer_of_reading_and_multiplying():
    shape = Shape(weight_bytes=1000, kv_bytes=10, weights=500, attention_width=4)
    slow_memory = Roof(bytes_per_s=100, flops_per_s=1e12, products="float32")
    assert shape.decode_s(slow_memory, batch=2, context=5) == (1000 + 2 * 5 * 10) / 100
    slow_units = Roof(bytes_per_s=1e12, flops_per_s=10, products="float32")
    assert shape.decode_s(slow_units, batch=2, context=5) == 2 * (2 * 500 + 4 * 5 * 4) / 10
    assert shape.prefill_s(slow_units, length=6) == 6 * (2 * 500 + 2 * 6 * 4) / 10


def test_roof_is_measured():
    roof = measure(torch.device("cpu"), torch.float32)
    assert roof.bytes_per_s > 1e8
    assert roof.flops_per_s > 1e8
    assert roof.products == "float32"


def test_engine_sweep(capsys, tmp_path):
    plot = tmp_path / "p.png"
    argv = ["engine", "--device", "cpu", "--batch", "1,3", "--context", "20", "--prefill", "9"]
    assert main([*argv, "--steps", "2", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "roofline" in out
    results = json.loads(out.splitlines()[-1])["results"]
    assert [(r["batch"], r["context"]) for r in results["decode"]] == [(1, 20), (3, 20)]
    assert [r["length"] for r in results["prefill"]] == [9]
    for row in results["decode"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1000)
        assert row["roofline"] == pytest.approx(row["least_ms"] / row["step_ms"])
        assert min(row["network_ms"], row["sampler_ms"], row["host_ms"]) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_prompts_that_take_many_steps(capsys, monkeypatch):
    """The first sequences had ended before the last prompt was computed, and the benchmark waited
    for ever for all of them to decode."""
    monkeypatch.setenv("NANOGPT_ENGINE_MAX_NUM_SEQS", "8")
    monkeypatch.setenv("NANOGPT_ENGINE_MAX_BATCH_TOKENS", "32")
    argv = ["engine", "--device", "cpu", "--batch", "8", "--context", "90", "--prefill", "9"]
    assert main([*argv, "--steps", "2"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["decode"]
    assert (row["batch"], row["context"]) == (8, 90)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "no-such"), "unknown model 'no-such'"),
        (("--batch", "0"), "numbers from 1 up"),
        (("--context", "256"), "more than the context of shakespeare-char: 256"),
        (("--batch", "5000"), "over max_num_seqs"),
        (("--dtype", "int3"), "int3"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(["engine", "--device", "cpu", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
