"""The command line of everything but the server, which is ./launch.sh."""

import importlib
import sys
from collections.abc import Sequence

from nanogpt.config import nearest

# Modules are imported when they are asked for: most take torch, and seconds.
COMMANDS = {
    "fetch": ("nanogpt.fetch", "download a model of the hub, checked"),
    "eval": ("nanogpt.eval.__main__", "loss, perplexity, bits per character on a text"),
    "convert": ("nanogpt.model.convert", "weights from and to nanoGPT, Hugging Face and our own"),
    "prepare": ("nanogpt.data.prepare", "a text as tokens, for training"),
    "train": ("nanogpt.train.__main__", "a model by a recipe"),
    "admin": ("nanogpt.admin", "API keys, bans, and why a user is refused"),
    "bench": ("nanogpt.bench.__main__", "measure speed"),
    "chaos": ("nanogpt.chaos.__main__", "break a cluster, and check what clients see"),
}


def usage() -> str:
    rows = [f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: nanogpt COMMAND ...", "", *rows, "", "COMMAND --help says more"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the arguments after it; returns its exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}{nearest(name, list(COMMANDS))}", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    return int(importlib.import_module(module).main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
