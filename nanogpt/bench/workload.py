"""What is asked of a server: lengths, arrivals, and the requests themselves."""

import random
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from nanogpt.errors import ConfigError

PromptKind = Literal["tokens", "text"]

# With a space in front each is one token of GPT-2's vocabulary.
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "is",
    "was",
    "for",
    "on",
    "with",
    "as",
    "by",
    "at",
    "from",
    "his",
    "it",
    "an",
    "were",
    "are",
    "which",
    "this",
    "be",
    "had",
    "not",
    "or",
    "they",
    "one",
    "you",
    "but",
    "have",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "more",
    "no",
    "if",
    "out",
)


class Lengths(msgspec.Struct, frozen=True):
    """A number of tokens: fixed, or uniformly distributed between two bounds (both included)."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """ "128" or "uniform:64:256". Raises ConfigError."""
        kind, *bounds = text.split(":")
        try:
            if kind == "uniform":
                low, high = map(int, bounds)
            else:
                low = high = int(text)
        except ValueError:
            raise ConfigError(f"length {text!r:.40}: give 128, or uniform:64:256") from None
        if not 1 <= low <= high:
            raise ConfigError(f"length {text!r:.40}: give numbers from 1 up, the lower one first")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of load. Either `concurrency` requests at a time, or `rate` a second (Poisson; then
    `concurrency`, if any, is the most that are open at once), until `requests` are sent or
    `duration_s` is over.
    """

    name: str = "custom"
    concurrency: int | None = None
    rate: float | None = None
    requests: int | None = None
    duration_s: float | None = None
    prompt: Lengths = Lengths(32, 32)
    output: Lengths = Lengths(128, 128)
    n: int = 1
    shared_prefix: int = 0  # the first so many of each prompt are the same for all
    temperature: float = 1.0
    sampling_seed: int | None = None
    stream: bool = True
    ignore_eos: bool = False
    prompt_kind: PromptKind = "tokens"

    def __post_init__(self) -> None:
        if self.shared_prefix > self.prompt.low:
            raise ConfigError(
                f"the shared prefix ({self.shared_prefix}) is longer than the shortest prompt "
                f"({self.prompt.low})"
            )
        if self.requests is None and self.duration_s is None:
            raise ConfigError("give a number of requests, a duration, or both")

    @property
    def burst(self) -> int:
        """Requests that are open at once at first."""
        most = self.concurrency or 1
        return most if self.requests is None else min(most, self.requests)

    def __str__(self) -> str:
        how = f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} a second"
        more = f", n {self.n}" if self.n > 1 else ""
        more += f", {self.shared_prefix} shared" if self.shared_prefix else ""
        return f"{self.name}: {how}, prompt {self.prompt}, output {self.output}{more}"


def _preset(name: str, streams: int, prompt: int, output: int = 128, n: int = 1) -> Workload:
    return Workload(
        name=name,
        concurrency=streams,
        requests=streams,
        prompt=Lengths(prompt, prompt),
        output=Lengths(output, output),
        n=n,
    )


PRESETS = {
    w.name: w
    for w in (
        _preset("W1", 1, 32),
        _preset("W2", 8, 32),
        _preset("W3", 32, 32),
        _preset("W4", 1, 256, n=16),
        _preset("W5", 1, 900, output=1),
    )
}


def presets(names: str) -> list[Workload]:
    """ "W1,W3" as workloads. Raises ConfigError."""
    found = []
    for name in names.split(","):
        if name.strip().upper() not in PRESETS:
            raise ConfigError(f"unknown workload {name!r:.40}; known are {', '.join(PRESETS)}")
        found.append(PRESETS[name.strip().upper()])
    return found


def bodies(workload: Workload, model: str, vocab_size: int, seed: int) -> Iterator[bytes]:
    """JSON of one request after another, without end; the same for the same arguments.

    Prompts are random, so that no two have a prefix in common but the one that was asked for.
    """
    rng = random.Random(seed)
    prefix = _draw_prompt(workload, vocab_size, workload.shared_prefix, rng)
    fixed: dict[str, Any] = {"model": model, "n": workload.n, "temperature": workload.temperature}
    if workload.stream:
        fixed |= {"stream": True, "stream_options": {"include_usage": True}}
    if workload.ignore_eos:
        fixed["ignore_eos"] = True
    if workload.sampling_seed is not None:
        fixed["seed"] = workload.sampling_seed
    while True:
        length = workload.prompt.draw(rng) - workload.shared_prefix
        prompt: Any = [*prefix, *_draw_prompt(workload, vocab_size, length, rng)]
        if workload.prompt_kind == "text":
            prompt = "".join(prompt)
        yield msgspec.json.encode(
            {**fixed, "prompt": prompt, "max_tokens": workload.output.draw(rng)}
        )


def _draw_prompt(
    workload: Workload, vocab_size: int, length: int, rng: random.Random
) -> list[int] | list[str]:
    if workload.prompt_kind == "text":
        return [f" {word}" for word in rng.choices(WORDS, k=length)]
    return rng.choices(range(vocab_size), k=length)
