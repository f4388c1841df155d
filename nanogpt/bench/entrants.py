"""Who takes part in a comparison, as the options say it."""

import argparse

import msgspec

from nanogpt.errors import ConfigError
from nanogpt.network import free_port


class Entrant(msgspec.Struct):
    """A server before it is found: by URL, by a command that starts it, or both."""

    name: str
    url: str = ""
    model: str = ""
    command: str = ""


def entrants_of(args: argparse.Namespace) -> list[Entrant]:
    """In the order of the options. Raises ConfigError."""
    found: dict[str, Entrant] = {}
    for name, text in (("a", args.a), ("b", args.b)):
        if text:
            found[name] = _entrant(name, text)
    for text in args.server:
        name, _, rest = text.partition("=")
        if not name or "://" in name or name in found:
            raise ConfigError(f"--server {text!r:.100}: give NAME=URL, each name once")
        found[name] = _entrant(name, rest)
    named = [("a", args.a_command), ("b", args.b_command)]
    named += [(t.partition("=")[0], t.partition("=")[2]) for t in args.command]
    for name, command in named:
        if command:
            _add_command(found, name, command)
    return list(found.values())


def _entrant(name: str, text: str) -> Entrant:
    url, _, rest = text.partition(",")
    key, _, model = rest.partition("=")
    if rest and (key != "model" or not model):
        raise ConfigError(f"{text!r:.100}: give URL or URL,model=NAME")
    return Entrant(name, url, model)


def _add_command(found: dict[str, Entrant], name: str, command: str) -> None:
    entrant = found.setdefault(name, Entrant(name))
    if "{port}" in command:
        port = free_port()
        command = command.replace("{port}", str(port))
        entrant.url = entrant.url or f"http://127.0.0.1:{port}/v1"
    if not entrant.url:
        raise ConfigError(
            f"the command of {name!r:.40}: say where its server is, by its URL or {{port}}"
        )
    entrant.command = command
