"""The models of a running server from the command line: which are in memory, and changing that.

    nanogpt admin models list
    nanogpt admin models pin gpt2 --url http://127.0.0.1:8000

The admin key is in NANOGPT_ADMIN_KEY. `load`, `unload` and `pin` wait until it is done; what waits
for a model has it loaded again as soon as it is unloaded.
"""

import argparse
import http.client
import os
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import msgspec

from nanogpt.errors import ConfigError, NanogptError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0  # of one request
LOOK_S = 0.2
GIB = 2**30
DONE = {"load": "loaded", "pin": "loaded", "unload": "available"}


class ServerRefused(NanogptError):
    """The server's own words."""


class _Model(msgspec.Struct):
    """What is read of the server's answer: see Resident in nanogpt/api/residents.py."""

    id: str
    state: str
    pinned: bool
    memory_bytes: int
    running: int
    waiting: int
    last_used: int | None
    loads: int
    failures: int
    problem: str | None


class _List(msgspec.Struct):
    data: list[_Model]
    memory_bytes: int
    memory_limit_bytes: int | None


class _ErrorDetail(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    error: _ErrorDetail


def add_to(parser: argparse.ArgumentParser) -> None:
    """The commands, as options of `parser`; `run` carries out what was parsed."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (
        ("list", "the models, their state and their memory"),
        ("load", "bring a model into memory, as soon as there is room"),
        ("unload", "give a model's memory back, once what runs on it has finished"),
        ("pin", "keep a model in memory for good"),
        ("unpin", "let a model go again, when others need its memory"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--url", default=DEFAULT_URL, help=f"of the server ({DEFAULT_URL})")
        if name != "list":
            command.add_argument("model", metavar="MODEL")
        command.set_defaults(order=name)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError, ServerRefused."""
    if args.order == "list":
        _print(_list(args.url))
        return 0
    before = {model.id: model for model in _list(args.url).data}
    raw = _ask(args.url, f"/admin/models/{quote(args.model, safe='')}/{args.order}", b"")
    model = msgspec.json.decode(raw, type=_Model)
    was = before.get(model.id, model)
    while args.order in DONE and model.state != DONE[args.order]:
        if args.order == "unload" and model.loads > was.loads:
            break  # it was unloaded, and a request that waited has had it loaded again
        if args.order != "unload" and model.failures > was.failures:
            raise ServerRefused(f"{model.id} could not be loaded: {model.problem}")
        time.sleep(LOOK_S)
        model = next(m for m in _list(args.url).data if m.id == model.id)
    print(_line(model))
    return 0


def _list(url: str) -> _List:
    return msgspec.json.decode(_ask(url, "/admin/models"), type=_List)


def _ask(url: str, path: str, body: bytes | None = None) -> bytes:
    key = os.environ.get("NANOGPT_ADMIN_KEY")
    if not key:
        raise ConfigError("NANOGPT_ADMIN_KEY is not set: it takes an admin key of the server")
    request = urllib.request.Request(
        url.rstrip("/") + path, body, {"Authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found: bytes = answer.read()
            return found
    except urllib.error.HTTPError as error:
        raise ServerRefused(_message(error)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError(f"no server answers at {url}: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return msgspec.json.decode(error.read(), type=_Error).error.message
    except msgspec.MsgspecError:
        return f"the server answered {error.code}"


def _print(found: _List) -> None:
    for model in found.data:
        print(_line(model))
    limit = found.memory_limit_bytes
    of = f" of {limit / GIB:.2f}" if limit else ""
    print(f"in memory on each rank: {found.memory_bytes / GIB:.2f}{of} GiB")


def _line(model: _Model) -> str:
    parts = [f"{model.id}: {model.state}", f"{model.memory_bytes / GIB:.2f} GiB"]
    parts += ["pinned"] if model.pinned else []
    parts += [f"{model.running} running, {model.waiting} waiting"]
    if model.last_used is not None:
        parts.append(time.strftime("used %Y-%m-%d %H:%M:%S", time.localtime(model.last_used)))
    parts += [f"could not be loaded: {model.problem}"] if model.problem else []
    return ", ".join(parts)
