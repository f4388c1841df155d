"""Helpers of the engine's tests: requests, tiny models, and a runner that needs no network."""

import functools
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from nanogpt.engine.engine import Engine
from nanogpt.engine.model_runner import StepOutput
from nanogpt.engine.scheduler import Batch
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.uniforms import uniforms
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.model.load import LoadedModel
from nanogpt.registry import ModelInfo, TokenizerSpec
from nanogpt.request import (
    EngineEvent,
    GenerateRequest,
    PromptScored,
    RequestFailed,
    TokenEvent,
    TokenLogprobs,
)
from nanogpt.sampling_params import SamplingParams

VOCAB_SIZE = 65


def model_info(context_length: int = 64, eos_token_id: int | None = None) -> ModelInfo:
    return ModelInfo(
        name="tiny",
        context_length=context_length,
        vocab_size=VOCAB_SIZE,
        eos_token_id=eos_token_id,
        start_token_id=0,
        tokenizer=TokenizerSpec(kind="char", characters="x" * VOCAB_SIZE),
        dtype="float32",
        fingerprint="00",
        created=0,
        num_parameters=1,
    )


def request(
    request_id: str = "r",
    *prompts: list[int],
    n: int = 1,
    owners: tuple[int, ...] | None = None,
    resumed: tuple[tuple[int, ...], ...] = (),
    finished: tuple[int, ...] = (),
    priority: int = 0,
    tenant: str = "",
    weight: float = 1.0,
    **params: Any,
) -> GenerateRequest:
    prompts = prompts or ([1, 2, 3],)
    return GenerateRequest(
        request_id=request_id,
        model="tiny",
        prompts=tuple(map(tuple, prompts)),
        n=n,
        params=SamplingParams(**{"seed": 1, **params}),
        owners=owners or (0,) * (len(prompts) * n),
        resumed=resumed,
        finished=finished,
        priority=priority,
        tenant=tenant,
        weight=weight,
    )


def tiny_gpt(
    context: int,
    *,
    seed: int = 7,
    vocab_rows: int = 72,
    n_embd: int = 32,
    gain: float = 6.0,
    head_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    eos_token_id: int | None = None,
) -> LoadedModel:
    """Random weights, `gain` times as large as at the start of training, so that what a token
    follows from shows in its logits. The head is its own: a tied one would make most networks
    repeat the last token for ever."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(block_size=context, vocab_size=vocab_rows, n_layer=2, n_head=2, n_embd=n_embd)
    )
    model.init_weights()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(gain)
    model.lm_head.weight = nn.Parameter(torch.randn(vocab_rows, n_embd) * head_scale)
    model = model.to(dtype).eval().requires_grad_(False)
    return LoadedModel(model, model_info(context, eos_token_id))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for torch. Networks this small gain nothing from a second one, and lose much on a
    busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


class FakeRunner:
    """Stands for network, cache and sampler, and checks what the scheduler hands it.

    A slot of the cache holds a digest of the whole prefix up to its token, as a real one holds
    keys and values that depend on it. Tokens are a function of the prefix and of the uniform.
    """

    def __init__(self, loaded: Any, *, num_kv_blocks: int, block_size: int, **_: Any) -> None:
        self.eos_token_id = loaded.info.eos_token_id
        self.block_size = block_size
        self.slots: list[bytes] = [b""] * (num_kv_blocks * block_size)
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> StepOutput:
        self.batches.append(batch)
        self._copy(batch)
        for chunk in batch.chunks:
            self._write(chunk.seq, chunk.start, chunk.end)
        output = StepOutput([], [], [])
        for chunk in batch.chunks:
            assert chunk.start < chunk.end
            self._check(chunk.seq, chunk.end)
            if chunk.seq.scoring:
                self._score(chunk.seq, chunk.start, chunk.end, output)
            for seq in chunk.samplers:
                assert seq.tokens == chunk.seq.tokens
                output.token_ids.append(self._token(seq))
                output.logprobs.append(None)
        return output

    def _copy(self, batch: Batch) -> None:
        size = self.block_size
        blocks = [self.slots[source * size : (source + 1) * size] for source, _ in batch.copies]
        for (_, target), block in zip(batch.copies, blocks, strict=True):
            self.slots[target * size : (target + 1) * size] = block

    def _slot(self, seq: Sequence, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return seq.block_table[block] * self.block_size + offset

    def _write(self, seq: Sequence, start: int, end: int) -> None:
        digests = prefix_digests(seq.tokens[:end])
        for position in range(start, end):
            self.slots[self._slot(seq, position)] = digests[position]

    def _check(self, seq: Sequence, end: int) -> None:
        for position, digest in enumerate(prefix_digests(seq.tokens[:end])):
            assert self.slots[self._slot(seq, position)] == digest, (seq, position)

    def _score(self, seq: Sequence, start: int, end: int, output: StepOutput) -> None:
        last = min(end, seq.prompt_len - 1)
        assert seq.score_next > start, "a position to be scored was not computed"
        entries = tuple(
            TokenLogprobs(-float(seq.tokens[i]), (), ()) for i in range(seq.score_next, last + 1)
        )
        output.scores.append((seq, entries))

    def _token(self, seq: Sequence) -> int:
        row = uniforms(seq.params.seed, seq.prompt_i, seq.choice_j, seq.max_new)
        return fake_token(seq.tokens, row[seq.output_len])


@functools.lru_cache(2**18)
def _longer(digest: bytes, token: int) -> bytes:
    return hashlib.blake2b(digest + token.to_bytes(4, "little"), digest_size=8).digest()


def prefix_digests(tokens: list[int]) -> list[bytes]:
    """For each token a digest of all up to it, so of the whole prefix in its order."""
    digests, digest = [], b""
    for token in tokens:
        digest = _longer(digest, token)
        digests.append(digest)
    return digests


def fake_token(tokens: list[int], uniform: float) -> int:
    return (prefix_digests(tokens)[-1][0] + int(uniform * 2**20)) % VOCAB_SIZE


def fake_output(req: GenerateRequest, index: int, context_length: int = 64) -> list[int]:
    """What a choice has to bring when a fake runner runs it, without any engine."""
    prompt_i, choice_j = divmod(index, req.n)
    tokens = [*req.prompts[prompt_i]]
    count = min(req.params.max_tokens, context_length - len(tokens))
    for uniform in uniforms(req.params.seed, prompt_i, choice_j, count):
        tokens.append(fake_token(tokens, uniform))
    return tokens[len(tokens) - count :]


class FakeLoaded:
    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.config = GPTConfig(
            block_size=info.context_length, vocab_size=VOCAB_SIZE, n_layer=1, n_head=1, n_embd=8
        )


def fake_engine(
    *,
    num_kv_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 16,
    max_batch_tokens: int = 32,
    context_length: int = 64,
    eos_token_id: int | None = None,
    rank: int = 0,
) -> Engine:
    """An engine with everything but network and sampler."""
    with patch("nanogpt.engine.engine.ModelRunner", FakeRunner):
        return Engine(
            FakeLoaded(model_info(context_length, eos_token_id)),
            rank=rank,
            device="cpu",
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
        )


class Collector:
    """Takes an engine's events as the front end does, and checks their order."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[TokenLogprobs]] = {}
        self.finish_reasons: dict[tuple[str, int], str] = {}
        self.scores: dict[tuple[str, int], list[TokenLogprobs]] = {}
        self.cached: dict[tuple[str, int], int] = {}
        self.failed: dict[str, str] = {}

    def expect_resumed(self, request: GenerateRequest) -> None:
        for index, tokens in enumerate(request.resumed):
            self.tokens[request.request_id, index] = [*tokens]

    def take(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self._take_tokens(event)
            elif isinstance(event, PromptScored):
                scores = self.scores.setdefault((event.request_id, event.prompt_i), [])
                assert event.position == len(scores) + 1
                assert event.logprobs
                scores += event.logprobs
            else:
                assert isinstance(event, RequestFailed)
                assert event.request_id not in self.failed
                self.failed[event.request_id] = event.message

    def _take_tokens(self, event: TokenEvent) -> None:
        key = event.request_id, event.index
        assert key not in self.finish_reasons, f"{key} goes on after its end"
        self.cached.setdefault(key, event.cached_tokens)
        tokens = self.tokens.setdefault(key, [])
        assert event.position == len(tokens)
        tokens += event.token_ids
        self.logprobs.setdefault(key, []).extend(event.logprobs)
        if event.finish_reason:
            self.finish_reasons[key] = event.finish_reason


def run_all(engine: Engine, *requests: GenerateRequest, max_steps: int = 5000) -> Collector:
    """Add the requests and step until nothing is left, checking integrity after every step."""
    collector = Collector()
    for each in requests:
        collector.expect_resumed(each)
        engine.add(each)
    for _ in range(max_steps):
        if not engine.has_work:
            return collector
        collector.take(engine.step())
        engine.check_integrity()
    raise AssertionError(f"not done after {max_steps} steps")
