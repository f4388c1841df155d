"""Answers in one shape, whether they were streamed or not, and without what may differ."""

import json
from collections.abc import Iterable
from typing import Any

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Disorder(Exception):
    """A stream that no client could make sense of."""


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer says: its choices by index, its usage and its fingerprint."""
    return {
        "choices": {c["index"]: _choice(c) for c in answer["choices"]},
        "usage": _usage(answer["usage"]),
        "system_fingerprint": answer["system_fingerprint"],
    }


def merged(events: Iterable[str]) -> dict[str, Any]:
    """The events of a stream as the answer that they make up. Raises Disorder."""
    choices: dict[int, dict[str, Any]] = {}
    usage, fingerprint, ids = None, None, set()
    for data in events:
        chunk = json.loads(data)
        if usage is not None:
            raise Disorder("an event after the usage")
        ids.add(chunk["id"])
        fingerprint = chunk["system_fingerprint"]
        for part in chunk["choices"]:
            _append(choices.setdefault(part["index"], {}), part)
        usage = _usage(chunk["usage"]) if chunk.get("usage") else None
    if len(ids) > 1:
        raise Disorder(f"{len(ids)} ids in one stream")
    return {"choices": choices, "usage": usage, "system_fingerprint": fingerprint}


def _append(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if choice.get("finish_reason"):
        raise Disorder(f"choice {part['index']} goes on after its end")
    fresh = _choice(part)
    if not choice:
        choice.update(fresh)
        return
    choice["text"] += fresh["text"]
    choice["token_ids"] += fresh["token_ids"]
    choice["finish_reason"] = fresh["finish_reason"]
    for name in LISTS:
        choice["logprobs"][name] += fresh["logprobs"][name]


def _choice(raw: dict[str, Any]) -> dict[str, Any]:
    logprobs = raw.get("logprobs") or {}
    return {
        "text": raw["text"],
        "token_ids": list(raw.get("token_ids") or ()),
        "finish_reason": raw["finish_reason"],
        "logprobs": {name: list(logprobs.get(name, ())) for name in LISTS},
    }


def _usage(raw: dict[str, Any]) -> dict[str, int]:
    """How much was cached depends on what ran before: everything else is the request's own."""
    return {key: value for key, value in raw.items() if isinstance(value, int)}
