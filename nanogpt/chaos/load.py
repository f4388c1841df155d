"""The requests of a run: a mix that uses what the API has, made from a seed."""

import random
from typing import Any

MODEL = "shakespeare-char"
PROMPTS = [
    "ROMEO:",
    "JULIET:\nO ",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n",
    "KING RICHARD III:\nNow is the winter of our discontent\nMade glorious summer",
    "",
]
STOPS = ["\n\n", "the", ":", "and", "!", "thou"]
MAX_TOKENS = 96  # with the longest prompt it is well within the bundled model's context


def make_body(rng: random.Random) -> dict[str, Any]:
    """A request without `stream`. It has a seed, so that its answer is always the same."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": _prompt(rng),
        "seed": rng.randrange(2**31),
        "max_tokens": rng.randint(8, MAX_TOKENS),
        "n": rng.choice([1, 1, 1, 2, 4]),
        "temperature": rng.choice([0, 0.7, 1]),
        "return_token_ids": True,
    }
    for chance, extra in (
        (0.3, {"stop": rng.sample(STOPS, rng.randint(1, 3))}),
        (0.3, {"logprobs": rng.choice([0, 1, 5])}),
        (0.25, {"echo": True}),
        (0.2, {"top_p": 0.9}),
        (0.1, {"presence_penalty": 0.5, "frequency_penalty": 0.3}),
        (0.1, {"top_k": 12, "repetition_penalty": 1.1}),
    ):
        if rng.random() < chance:
            body |= extra
    if rng.random() < 0.1:
        body["best_of"] = body["n"] + 1
    return body


def _prompt(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(PROMPTS)
    if kind < 0.85:
        return rng.sample(PROMPTS, 2)
    ids = [rng.randrange(1, 60) for _ in range(rng.randint(1, 60))]
    return ids if kind < 0.95 else [ids, ids[::-1]]


def may_stream(body: dict[str, Any]) -> bool:
    return "best_of" not in body


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """The same request as a stream that tells its usage at the end."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}
