"""Our server on one machine and with a queue between its parts: calls that wait, and batches."""

import asyncio
import contextlib
import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nanogpt.bench.connection import request
from nanogpt.bench.managed import ManagedServer, stopping
from nanogpt.bench.stats import MS, Rate, percentile
from nanogpt.bench.target import Target, find_target
from nanogpt.config import PROJECT
from nanogpt.errors import StartupError
from nanogpt.jobs_config import QueueConfig
from nanogpt.network import free_port

START_S = 180.0
WARM_CALLS = 3
PROMPT_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "  # that any tokenizer knows
BOUNDARY = "bench-boundary"
# Asking costs the engines time, some milliseconds of one core. So the time of a batch is known to
# within this only, and is meant for one that takes minutes.
POLL_S = 0.5


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """Whole answers, the servers taking turns. Milliseconds."""

    queue: str
    count: int
    local_p50: float
    split_p50: float
    added_p50: float  # median over pairs
    added_p90: float
    ratio: float  # of the medians


class Batches(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second of one file of lines: from POST /v1/batches until it is completed, against
    the engine alone with all lines at once. Without a queue: on one machine."""

    queue: str
    lines: int
    tokens: int
    batch: Rate
    engine: Rate
    ratio: float  # of the medians


@contextlib.contextmanager
def serving(model: str, folder: Path, queue: QueueConfig | None) -> Iterator[Target]:
    """Our server, ready; with a queue its two parts. Raises StartupError."""
    options: list[str] = []
    if queue is not None:
        options = ["--queue", queue.url, *(["--results", queue.results] if queue.results else [])]
    roles = {"web": "--role web", "worker": "--role worker"} if queue else {"server": ""}
    started: list[ManagedServer] = []
    with stopping(started):
        for role in reversed(roles):
            port = free_port()
            url = f"http://127.0.0.1:{port}/v1"
            chosen = "" if role == "web" else f"--model {shlex.quote(model)} --ranks 1"
            command = f"exec ./launch.sh --port {port} {roles[role]} {chosen} {shlex.join(options)}"
            own = folder / f"{role}-{port}"
            own.mkdir(mode=0o700)
            variables = {
                "NANOGPT_RUN_DIR": str(own),
                "NANOGPT_ADMISSION_STATE": ":memory:",
                "NANOGPT_JOBS_PATH": str(own / "jobs"),
            }
            started.append(ManagedServer(role, command, url, cwd=PROJECT, environ=variables))
        started[-1].wait(START_S)
        yield find_target(url)


def calls(queue: str, local: Target, split: Target, count: int, output_len: int) -> Calls:
    """So many of each. Raises StartupError."""
    times: dict[str, list[float]] = {"local": [], "split": []}
    targets = {"local": local, "split": split}
    for i in range(count + WARM_CALLS):
        body = {"model": "", "prompt": "a", "max_tokens": output_len, "seed": i}
        for name in sorted(targets, reverse=i % 2 == 1):
            started = time.perf_counter()
            _ask(targets[name], "POST", "/completions", {**body, "model": targets[name].model})
            if i >= WARM_CALLS:
                times[name].append((time.perf_counter() - started) * MS)
    added = sorted(s - a for a, s in zip(times["local"], times["split"], strict=True))
    local_p50, split_p50 = (statistics.median(times[name]) for name in ("local", "split"))
    return Calls(
        queue=queue,
        count=count,
        local_p50=local_p50,
        split_p50=split_p50,
        added_p50=percentile(added, 50),
        added_p90=percentile(added, 90),
        ratio=split_p50 / local_p50,
    )


def batches(
    queue: str, target: Target, model: str, lines: int, line_len: int, rounds: int
) -> Batches:
    """Batch and engine take turns. Raises StartupError."""
    tokens = lines * line_len
    found: list[float] = []
    engine: list[float] = []
    for i in range(rounds):
        engine.append(_engine_rate(model, lines, line_len, i))
        found.append(tokens / _batch_s(target, lines, line_len, i))
    ratio = statistics.median(found) / statistics.median(engine)
    return Batches(
        queue=queue,
        lines=lines,
        tokens=tokens,
        batch=Rate.of(found),
        engine=Rate.of(engine),
        ratio=ratio,
    )


def prompts(lines: int, seed: int) -> list[str]:
    """Different ones of 16 characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(PROMPT_CHARACTERS, k=16)) for _ in range(lines)]


def _engine_rate(model: str, lines: int, line_len: int, seed: int) -> float:
    """In a process of its own, which leaves its memory to the servers."""
    command = [sys.executable, "-m", "nanogpt.bench.own_rate"]
    command += [model, str(lines), str(line_len), str(seed)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StartupError(f"the engine alone failed: {done.stderr[-500:]}")
    return float(done.stdout.splitlines()[-1])


def _batch_s(target: Target, lines: int, line_len: int, seed: int) -> float:
    file_id = _upload(target, _file(target.model, prompts(lines, seed), line_len))["id"]
    body = {
        "input_file_id": file_id,
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    started = time.perf_counter()
    batch = _ask(target, "POST", "/batches", body)
    while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(POLL_S)
        batch = _ask(target, "GET", f"/batches/{batch['id']}")
    elapsed = time.perf_counter() - started
    if batch["status"] != "completed" or batch["request_counts"]["completed"] != lines:
        raise StartupError(f"the batch ended as {batch}")
    return elapsed


def _file(model: str, texts: Sequence[str], line_len: int) -> bytes:
    found = []
    for i, text in enumerate(texts):
        body = {"model": model, "prompt": text, "max_tokens": line_len, "ignore_eos": True}
        line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        found.append(json.dumps(line))
    return "\n".join(found).encode()


def _upload(target: Target, content: bytes) -> dict[str, Any]:
    head = 'Content-Disposition: form-data; name="{}"'
    parts = [
        f"--{BOUNDARY}\r\n{head.format('purpose')}\r\n\r\nbatch\r\n".encode(),
        f'--{BOUNDARY}\r\n{head.format("file")}; filename="in.jsonl"\r\n\r\n'.encode(),
        content,
        f"\r\n--{BOUNDARY}--\r\n".encode(),
    ]
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    return _send(target, "POST", "/files", b"".join(parts), {"Content-Type": kind})


def _ask(
    target: Target, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return _send(target, method, path, b"" if body is None else json.dumps(body).encode(), {})


def _send(
    target: Target, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> dict[str, Any]:
    reply = asyncio.run(
        request(target.url, method, path, body=body, headers=headers, timeout_s=target.timeout_s)
    )
    if reply.status != 200:
        raise StartupError(f"{path} answers {reply.status}: {reply.body[:300]!r}")
    found: dict[str, Any] = json.loads(reply.body)
    return found
