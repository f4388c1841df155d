"""The server under load: where it is, and which model of it."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from nanogpt.bench.connection import ConnectionLost, Reply, Url, request
from nanogpt.bench.outcome import error_message
from nanogpt.errors import ConfigError, StartupError

ASK_TIMEOUT_S = 10.0
GPT2_VOCAB_SIZE = 50257


class Target(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # for tables
    url: Url
    model: str
    api_key: str = ""
    vocab_size: int = GPT2_VOCAB_SIZE  # ids of random prompts are below it
    timeout_s: float = 600.0  # for one request

    @property
    def headers(self) -> dict[str, str]:
        return authorization(self.api_key)


async def post(target: Target, body: bytes, on_line: Callable[[bytes], None] | None) -> Reply:
    """Ask for a completion. Raises ConnectionLost; any status is an answer."""
    return await request(
        target.url,
        "POST",
        "/completions",
        body=body,
        headers=target.headers,
        timeout_s=target.timeout_s,
        on_line=on_line,
    )


def authorization(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def find_target(
    url: str,
    *,
    name: str = "server",
    model: str = "",
    api_key: str = "",
    vocab_size: int | None = None,
    timeout_s: float = 600.0,
) -> Target:
    """Ask the server what it has. Without `model` it must have just one.

    Raises ConfigError and StartupError: nobody answers, or there is no such model.
    """
    at = Url.parse(url)
    models = _models(at, api_key)
    if not model:
        model = _only(at, models)
    elif models and model not in models:
        raise ConfigError(f"{at} has no model {model!r:.100}; it has {', '.join(models)}")
    found = vocab_size or _vocab_size(models.get(model, {})) or _ask_vocab_size(at, model, api_key)
    return Target(
        name=name,
        url=at,
        model=model,
        api_key=api_key,
        vocab_size=found or GPT2_VOCAB_SIZE,
        timeout_s=timeout_s,
    )


def _only(url: Url, models: dict[str, dict[str, Any]]) -> str:
    """The one that is loaded: ours lists those that could be as well. Raises ConfigError."""
    names = [name for name, entry in models.items() if entry.get("state", "loaded") == "loaded"]
    if len(names) != 1:
        listed = ", ".join(names) or "none that it lists"
        raise ConfigError(f"choose a model of {url} with --model; it has {listed}")
    return names[0]


def get(url: Url, path: str, api_key: str = "") -> Reply:
    """Raises ConnectionLost."""
    return asyncio.run(
        request(url, "GET", path, headers=authorization(api_key), timeout_s=ASK_TIMEOUT_S)
    )


def _models(url: Url, api_key: str) -> dict[str, dict[str, Any]]:
    """What GET /models lists, by name."""
    try:
        reply = get(url, "/models", api_key)
    except ConnectionLost as error:
        raise StartupError(f"nobody answers at {url}: {error}") from error
    if reply.status == 401:
        raise StartupError(f"{url} wants a key: give one with --api-key")
    if reply.status != 200:
        message = error_message(reply.body)
        raise StartupError(f"{url}/models answers {reply.status}: {message:.200}")
    try:
        listed = msgspec.json.decode(reply.body, type=dict[str, Any])["data"]
        return {str(entry["id"]): entry for entry in listed}
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise StartupError(f"{url}/models is not a list of models; is the path right?") from error


def _vocab_size(model: dict[str, Any]) -> int | None:
    """As llama-server tells it."""
    meta = model.get("meta")
    size = meta.get("n_vocab") if isinstance(meta, dict) else None
    return size if isinstance(size, int) else None


def _ask_vocab_size(url: Url, model: str, api_key: str) -> int | None:
    """As our own server tells it; None when this one doesn't."""
    try:
        reply = get(url.root, f"/tokenizer_info?model={model}", api_key)
        size = msgspec.json.decode(reply.body, type=dict[str, Any]).get("vocab_size")
    except (ConnectionLost, msgspec.MsgspecError):
        return None
    return size if reply.status == 200 and isinstance(size, int) else None
