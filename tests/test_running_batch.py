"""A decode batch that is carried from step to step equals one that is packed anew."""

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from nanogpt.engine.engine import Engine
from nanogpt.engine.model_runner import ModelRunner, StepOutput
from nanogpt.engine.packing import pack
from nanogpt.engine.scheduler import Batch
from tests.engine_utils import VOCAB_SIZE, FakeLoaded, FakeRunner, model_info, request

CPU = torch.device("cpu")


class ComparingRunner(FakeRunner):
    """Compares what the network would get with a batch packed from nothing."""

    def __init__(self, loaded: Any, **options: Any) -> None:
        super().__init__(loaded, **options)
        cache = SimpleNamespace(block_size=self.block_size)
        self.subject = SimpleNamespace(_running=None, _cache=cache, _device=CPU)
        self.followed = self.rebuilt = 0

    def run(self, batch: Batch) -> StepOutput:
        before = self.subject._running
        token_ids, found = ModelRunner._inputs(self.subject, batch)  # type: ignore[arg-type]
        running = self.subject._running
        self.followed += running is not None and running is before
        self.rebuilt += batch.follows and running is not before
        expected_ids, expected = pack(batch.chunks, self.block_size, CPU)
        assert torch.equal(token_ids, expected_ids)
        for name in ("positions", "slots", "sequence_of"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert found.host_counts == expected.host_counts
        assert found.max_keys == expected.max_keys
        width = expected.block_tables.size(1)
        for row, chunk in enumerate(batch.chunks):
            used = -(-chunk.end // self.block_size)
            assert torch.equal(found.block_tables[row, :used], expected.block_tables[row, :used])
        assert found.block_tables.size(1) >= width
        assert found.block_tables.is_contiguous()
        return super().run(batch)


def test_it_equals_a_batch_that_is_packed_anew() -> None:
    """Long outputs in blocks of 4, so that tables outgrow their spare columns too; a pool that is
    too small, so that sequences come back with other blocks."""
    with patch("nanogpt.engine.engine.ModelRunner", ComparingRunner):
        engine = Engine(
            FakeLoaded(model_info(200)),  # type: ignore[arg-type]
            rank=0,
            device="cpu",
            num_kv_blocks=120,
            block_size=4,
            max_num_seqs=10,
            max_batch_tokens=32,
        )
    rng = random.Random(1)
    for i in range(30):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
        engine.add(request(f"r{i}", prompt, n=rng.choice([1, 3]), max_tokens=150))
    while engine.has_work:
        engine.step()
    runner: Any = engine._runner
    assert engine.stats().preemptions > 0
    assert runner.followed > 500
    assert runner.rebuilt > 0
