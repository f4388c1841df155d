"""A cluster that plays scripted tokens, for tests of the HTTP layer without engines."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanogpt.cluster.residency import ModelStatus
from nanogpt.errors import Conflict, ModelNotFound, Unavailable
from nanogpt.registry import CardShape, ModelCard, ModelInfo, TokenizerSpec
from nanogpt.request import (
    EngineEvent,
    EngineStats,
    GenerateRequest,
    PromptScored,
    RequestFailed,
    TokenEvent,
    TokenLogprobs,
)

EOS = 256
WORDS = [
    b"<|endoftext|>",
    b"the",
    b" the",
    b" and",
    b"\n\n",
    b"ab",
    b"abc",
    b"END now",
    "né".encode(),
]


class ByteTokenizer:
    """256 bytes, an end token, and a few longer tokens; encodes by the longest match."""

    n_vocab = 256 + len(WORDS)
    eos_token_id = EOS
    start_token_id = EOS
    max_token_bytes = max(map(len, WORDS))

    def __init__(self) -> None:
        self._bytes = [bytes([i]) for i in range(256)] + WORDS
        self._ids = {raw: i for i, raw in enumerate(self._bytes)}
        self.encoded = 0  # calls, for tests that want none

    def encode(self, text: str) -> list[int]:
        self.encoded += 1
        raw, ids = text.encode(), []
        while raw:
            size = next(k for k in range(min(13, len(raw)), 0, -1) if raw[:k] in self._ids)
            ids.append(self._ids[raw[:size]])
            raw = raw[size:]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]


# Another name of the model below.
CARDS = {
    "fake/model": ModelCard(
        name="fake/model",
        hub="fake/model",
        aliases=("fake", "fake/old-name"),
        tokenizer="gpt2",
        context=64,
        shape=CardShape(n_layer=1, n_head=1, n_embd=8, vocab_size=257),
        dtype="float32",
        licence="MIT",
    )
}

INFO = ModelInfo(
    name="fake/model",
    context_length=64,
    vocab_size=ByteTokenizer.n_vocab,
    eos_token_id=EOS,
    start_token_id=EOS,
    tokenizer=TokenizerSpec(kind="gpt2"),
    dtype="float32",
    fingerprint="0123abcd",
    created=1_700_000_000,
    num_parameters=124_000_000,
)


class Status(NamedTuple):
    epoch: int = 3
    ranks: int = 2
    ready: bool = True
    draining: bool = False
    detail: str = "ready"


def logprobs_of(token_id: int, k: int) -> TokenLogprobs:
    """Made-up values: the token itself and its k followers, likeliest first."""
    own = -0.25 - (token_id % 7) / 8
    ids = tuple((token_id + 1 + i) % ByteTokenizer.n_vocab for i in range(k))
    return TokenLogprobs(own, ids, tuple(own - 1.0 - i / 4 for i in range(k)))


Script = Callable[[GenerateRequest], list[list[EngineEvent]]]


def play(
    texts: Sequence[Sequence[int]], finish: str = "length", chunk: int = 1, prompt_chunk: int = 3
) -> Script:
    """Choice i gets the tokens texts[i % len(texts)], `chunk` at a time, cut at max_tokens."""

    def script(request: GenerateRequest) -> list[list[EngineEvent]]:
        params, batches = request.params, []
        k = params.logprobs
        if params.prompt_logprobs:
            for p, prompt in enumerate(request.prompts):
                for at in range(1, len(prompt), prompt_chunk):
                    values = tuple(logprobs_of(t, k or 0) for t in prompt[at : at + prompt_chunk])
                    batches.append([PromptScored(request.request_id, p, at, values)])
        count = len(request.prompts) * request.n
        outputs = [tuple(texts[i % len(texts)])[: params.max_tokens] for i in range(count)]
        longest = max(1, *map(len, outputs))
        for at in range(0, longest, chunk):
            batch: list[EngineEvent] = []
            for i, output in enumerate(outputs):
                if at and at >= len(output):
                    continue
                ids = output[at : at + chunk]
                last = at + chunk >= len(output)
                reason = None
                if last:
                    reason = "length" if len(output) == params.max_tokens else finish
                values = () if k is None else tuple(logprobs_of(t, k) for t in ids)
                end = None
                if reason == "stop" and k is not None:
                    end, values = EOS, (*values, logprobs_of(EOS, k))
                cached = 2 if at == 0 else 0
                batch.append(
                    TokenEvent(request.request_id, i, at, ids, values, reason, cached, end)
                )
            batches.append(batch)
        return batches

    return script


class FakeHandle:
    """Plays its batches, one for each call of `events`; then nothing comes any more."""

    def __init__(
        self,
        request: GenerateRequest,
        ranks: int,
        batches: Sequence[Sequence[EngineEvent]],
        delay_s: float,
    ) -> None:
        self.request = request
        self.owners = tuple(i % ranks for i in range(len(request.prompts) * request.n))
        self.cancelled: list[int | None] = []
        self.left = threading.Event()  # set by cancel()
        self._delay_s = delay_s
        self._batches: queue.SimpleQueue[Sequence[EngineEvent]] = queue.SimpleQueue()
        for batch in batches:
            self._batches.put(batch)

    @property
    def is_played(self) -> bool:
        """Whether all its batches have been taken."""
        return self._batches.empty()

    def events(self, timeout: float) -> list[EngineEvent]:
        if self._delay_s:
            time.sleep(self._delay_s)
        try:
            return list(self._batches.get(timeout=timeout))
        except queue.Empty:
            return []

    def send_to(self, sink: Callable[[Sequence[EngineEvent]], None]) -> None:
        def play() -> None:
            while not self.left.is_set() and (events := self.events(0)):
                sink(events)

        threading.Thread(target=play, daemon=True).start()

    def cancel(self, index: int | None = None) -> None:
        self.cancelled.append(index)
        if index is None:
            self.left.set()


class FakeCluster:
    """`script` says what is generated; tests set the fields that they want otherwise."""

    def __init__(self, script: Script | None = None, infos: Sequence[ModelInfo] = (INFO,)) -> None:
        self.script = script or play([b"hello world"])
        self.infos = {info.name: info for info in infos}
        self.tok = ByteTokenizer()
        self.state = Status()
        self.states = {
            name: ModelStatus(name, "open", False, 10**6, 1, 0, None, 0.5, 1, 0, 0, "")
            for name in self.infos
        }
        self.refusal: Unavailable | None = None
        self.handles: list[FakeHandle] = []
        self.delay_s = 0.0
        self.drained = self.closed = False

    def models(self) -> dict[str, ModelInfo]:
        return self.infos

    def model_states(self) -> dict[str, ModelStatus]:
        return self.states

    def memory(self) -> tuple[int, int]:
        return sum(s.bytes for s in self.states.values() if s.state != "absent"), 0

    def load(self, model: str) -> None:
        self.states[model] = self.states[model]._replace(state="loading")

    def unload(self, model: str) -> None:
        if self.states[model].pinned:
            raise Conflict(f"the model {model!r} is pinned: unpin it first")
        self.states[model] = self.states[model]._replace(state="draining")

    def pin(self, model: str) -> None:
        self.states[model] = self.states[model]._replace(pinned=True)

    def unpin(self, model: str) -> None:
        self.states[model] = self.states[model]._replace(pinned=False)

    def tokenizer(self, model: str) -> ByteTokenizer:
        if model not in self.infos:
            raise ModelNotFound(f"the model {model!r} does not exist", param="model")
        return self.tok

    def ready(self) -> bool:
        return self.state.ready

    def status(self) -> Status:
        return self.state

    def stats(self) -> dict[int, tuple[EngineStats, ...]]:
        stats = EngineStats(
            INFO.name, waiting=1, running=2, free_blocks=30, total_blocks=40, generated_tokens=99
        )
        return {0: (stats,), 1: (stats,)}

    def submit(
        self, request: GenerateRequest, *, is_patient: bool = False, may_block: bool = True
    ) -> FakeHandle:
        if self.refusal:
            raise self.refusal
        handle = FakeHandle(request, self.state.ranks, self.script(request), self.delay_s)
        self.handles.append(handle)
        return handle

    def drain(self) -> None:
        self.drained = True
        self.refusal = Unavailable("the server is shutting down", code="draining")

    def close(self) -> None:
        self.closed = True


def fail_after(batches: int, script: Script) -> Script:
    """The script's first batches, then RequestFailed."""

    def failing(request: GenerateRequest) -> list[list[EngineEvent]]:
        failed = RequestFailed(request.request_id, "the rank ran out of memory")
        return [*script(request)[:batches], [failed]]

    return failing
