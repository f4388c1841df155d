"""An engine in this process, timed step by step: prefill by length, decode by batch and context."""

import contextlib
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from nanogpt import process
from nanogpt.bench.alone import ALONE
from nanogpt.bench.roofline import Roof, Shape, measure, synchronize
from nanogpt.bench.stats import MS
from nanogpt.config import ServeConfig
from nanogpt.engine.cpu.linear import multiplies_natively
from nanogpt.engine.kv_cache import blocks_per_context
from nanogpt.engine.model_runner import ModelRunner
from nanogpt.engine.sampler import Sampler
from nanogpt.engine.setup import build_engine, choose_device, load, plan_loaded
from nanogpt.errors import ConfigError
from nanogpt.registry import sources
from nanogpt.request import GenerateRequest, RequestFailed, TokenEvent
from nanogpt.sampling_params import SamplingParams
from nanogpt.tokenizer import load_tokenizer

WARM_STEPS = 3


class DecodeRow(msgspec.Struct, frozen=True):
    """Times are milliseconds of one step: one token for each of `batch` sequences."""

    batch: int
    context: int  # tokens before the new one, on average
    step_ms: float  # median
    tokens_per_s: float
    least_ms: float  # by the roofline
    roofline: float  # least over measured
    # The three in a pass of their own, so that timing does not slow the first; None where the
    # device runs bursts of steps by itself.
    network_ms: float | None
    sampler_ms: float | None
    host_ms: float | None  # scheduling, packing of a step's inputs, recording


class PrefillRow(msgspec.Struct, frozen=True):
    length: int
    ms: float  # until its first token, median
    tokens_per_s: float
    least_ms: float
    roofline: float


class Bench:
    """One model, loaded as a rank loads it, with blocks enough for the sweep."""

    def __init__(
        self,
        config: ServeConfig,
        batches: Sequence[int],
        contexts: Sequence[int] | None,
        lengths: Sequence[int] | None,
        steps: int,
    ) -> None:
        """Without contexts or lengths: parts of the model's context. Raises StartupError."""
        self.device = choose_device(config, ALONE)
        ((name, source),) = sources(config.models)
        loaded = load(config, name, source, self.device)
        self.info = loaded.info
        stored = loaded.model.wte.weight.dtype
        self.shape = Shape.of(
            loaded.model.config,
            loaded.info.num_parameters,
            item_bytes=1 if self.info.dtype == "int8" else stored.itemsize,
            kv_item_bytes=stored.itemsize,
        )
        whole = self.info.context_length
        self.contexts = contexts or [whole // 8, 3 * whole // 8]
        self.lengths = lengths or [whole // 8, whole // 2, 7 * whole // 8]
        engine = config.engine
        if max(batches) > engine.max_num_seqs:
            raise ConfigError(f"batch {max(batches)} is over max_num_seqs, {engine.max_num_seqs}")
        self._prompt_tokens = engine.max_batch_tokens // 2  # of a step, while others decode
        lead = self._lead(max(batches), max(self.contexts))
        self._check(max(self.contexts) + lead + _room(steps), max(self.lengths) + 1)
        tokens = max(batches) * (max(self.contexts) + lead + _room(steps) + engine.block_size)
        blocks = blocks_per_context(max(tokens, whole), engine.block_size)
        self._check_memory(blocks * engine.block_size * self.shape.kv_bytes)
        self._engine = build_engine(loaded, blocks + max(batches), config, ALONE, self.device)
        widened = self.device.type == "cpu" and not multiplies_natively(stored)
        self.roof: Roof = measure(self.device, torch.float32 if widened else stored)
        self._engine.warm_up()
        self._rng = random.Random(0)
        self._requests = 0

    def _check(self, *tokens: int) -> None:
        if max(tokens) > self.info.context_length:
            raise ConfigError(
                f"{max(tokens)} tokens, with room for the timed steps, are more than the context "
                f"of {self.info.name}: {self.info.context_length}"
            )

    def _check_memory(self, needed: int) -> None:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
        else:
            free = process.available_memory()
        if needed > free:
            raise ConfigError(
                f"the keys and values of the largest batch take {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} are free: use a smaller --batch or --context"
            )

    def prefill(self, length: int, repeats: int) -> PrefillRow:
        """One prompt alone; the first run does not count."""
        times = [self._prefill_s(length) for _ in range(repeats + 1)][1:]
        seconds = statistics.median(times)
        least = self.shape.prefill_s(self.roof, length)
        return PrefillRow(length, seconds * MS, length / seconds, least * MS, least / seconds)

    def _prefill_s(self, length: int) -> float:
        self._add(length, max_tokens=1)
        synchronize(self.device)
        started = time.perf_counter()
        while self._engine.has_work:
            self._step()
        synchronize(self.device)
        return time.perf_counter() - started

    def decode(self, batch: int, context: int, steps: int) -> DecodeRow:
        """`batch` sequences of different prompts, in the middle of their output."""
        lead = self._lead(batch, context)
        length = max(1, context - steps // 2 - WARM_STEPS - lead // 2)
        for _ in range(batch):
            self._add(length, max_tokens=lead + _room(steps) + steps)
        while self._step() < batch:  # until all are past their prompts
            assert self._engine.has_work, "a sequence ended before the last prompt was computed"
        for _ in range(WARM_STEPS):
            self._step()
        step = statistics.median(self._decode_s(batch) for _ in range(steps))
        parts = self._breakdown(batch, steps)
        self._engine.abort_all()
        least = self.shape.decode_s(self.roof, batch, context)
        return DecodeRow(
            batch=batch,
            context=context,
            step_ms=step * MS,
            tokens_per_s=batch / step,
            least_ms=least * MS,
            roofline=least / step,
            network_ms=parts.get("network"),
            sampler_ms=parts.get("sampler"),
            host_ms=parts.get("host"),
        )

    def _lead(self, batch: int, context: int) -> int:
        """Steps from the end of the first prompt to that of the last: the first sequence's lead."""
        return -(-batch * context // self._prompt_tokens)

    def _decode_s(self, batch: int) -> float:
        """Of a token for every sequence: an engine's step may bring several, or none yet."""
        started, tokens = time.perf_counter(), 0
        while tokens < batch:
            tokens += self._step()
        synchronize(self.device)
        return (time.perf_counter() - started) * batch / tokens

    def _breakdown(self, batch: int, steps: int) -> dict[str, float]:
        """Milliseconds of a step's parts."""
        with _stopwatches(self.device) as spent:
            started, tokens = time.perf_counter(), 0
            while tokens < steps * batch:
                tokens += self._step()
            whole = time.perf_counter() - started
        if not spent["run"]:
            return {}
        each = tokens / batch / MS
        return {
            "network": (spent["run"] - spent["sample"]) / each,
            "sampler": spent["sample"] / each,
            "host": (whole - spent["run"]) / each,
        }

    def _step(self) -> int:
        """Tokens that a step of the engine brought."""
        tokens = 0
        for event in self._engine.step():
            assert not isinstance(event, RequestFailed), event.message
            if isinstance(event, TokenEvent):
                tokens += len(event.token_ids)
        return tokens

    def _add(self, length: int, max_tokens: int) -> None:
        self._requests += 1
        self._engine.add(
            GenerateRequest(
                request_id=f"bench-{self._requests}",
                model=self.info.name,
                prompts=(tuple(self._rng.choices(range(self.info.vocab_size), k=length)),),
                n=1,
                owners=(0,),
                params=SamplingParams(seed=self._requests, max_tokens=max_tokens, ignore_eos=True),
            )
        )


class Lines:
    """One model, loaded as the only one of a rank, for requests that are there all at once."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises StartupError."""
        device = choose_device(config, ALONE)
        ((name, source),) = sources(config.models)
        loaded = load(config, name, source, device)
        self._tokenizer = load_tokenizer(loaded.info.tokenizer)
        blocks = plan_loaded(config, ALONE, device, [loaded])[loaded.info.name]
        self._engine = build_engine(loaded, blocks, config, ALONE, device)
        self._engine.warm_up()
        self._info = loaded.info

    def run(self, prompts: Sequence[str], tokens: int) -> None:
        """Until each prompt has got so many tokens."""
        for i, prompt in enumerate(prompts):
            params = SamplingParams(seed=i, max_tokens=tokens, ignore_eos=True)
            self._engine.add(
                GenerateRequest(
                    request_id=f"line-{i}",
                    model=self._info.name,
                    prompts=(tuple(self._tokenizer.encode(prompt)),),
                    n=1,
                    owners=(0,),
                    params=params,
                )
            )
        while self._engine.has_work:
            self._engine.step()


def _room(steps: int) -> int:
    """Tokens of output that timing a row takes, from the middle of its context on."""
    return 2 * steps + WARM_STEPS


@contextlib.contextmanager
def _stopwatches(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in ModelRunner.run, and of these in Sampler.sample, while this is open."""
    spent = {"run": 0.0, "sample": 0.0}

    def timed(kind: type, name: str) -> Any:
        inner = getattr(kind, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            started = time.perf_counter()
            result = inner(*args, **kwargs)
            synchronize(device)
            spent[name] += time.perf_counter() - started
            return result

        return outer

    originals = [(ModelRunner, "run", ModelRunner.run), (Sampler, "sample", Sampler.sample)]
    for kind, name, _ in originals:
        setattr(kind, name, timed(kind, name))
    try:
        yield spent
    finally:
        for kind, name, original in originals:
            setattr(kind, name, original)
