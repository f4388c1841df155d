"""The command line of launch.sh, rank_worker.py and frontend.py: one definition for all three."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from nanogpt import config
from nanogpt.config import ServeConfig
from nanogpt.errors import ConfigError

_EPILOG = """\
The same settings can be given in one TOML file (--config; see configs/serve/) and as NANOGPT_*
variables (NANOGPT_PORT=8001, NANOGPT_MODEL=gpt2,mine=/path, NANOGPT_ENGINE_BLOCK_SIZE=32).
Options win over variables, variables over the file.

examples:
  ./launch.sh                                        the bundled Shakespeare model on this machine
  ./launch.sh --model gpt2 --port 8080               GPT-2 from the Hugging Face hub
  ./launch.sh --config configs/serve/g4dn.12xlarge.toml
  ./launch.sh --model mine=/models/out/ckpt.pt       a nanoGPT checkpoint
  ./launch.sh --role web --queue redis://db:6379/0 --host 0.0.0.0      one of the web servers, and
  ./launch.sh --role worker --queue redis://db:6379/0 --model gpt2     one of their clusters
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = [s for action in self._actions for s in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = unknown.split()[0]
            message = f"unknown option {word!r}{config.nearest(word.split('=')[0], known)}"
        raise ConfigError(f"{message} (--help lists the options)")


def parser() -> argparse.ArgumentParser:
    """The options; each one that isn't given stays out of the result."""
    p = _Parser(
        prog="launch.sh",
        description="Serve nanoGPT and GPT-2 models with OpenAI's completions API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument("--config", metavar="FILE", help="TOML file with any of the settings")
    p.add_argument(
        "--role",
        metavar="all|web|worker",
        help="all: everything on this machine (the default); web: HTTP only, without models; "
        "worker: models only. Web servers and workers find each other through --queue",
    )
    p.add_argument(
        "--queue",
        metavar="URL",
        help="what web servers and workers share: redis://HOST:PORT/DB or sqs://HOST/ACCOUNT/NAME",
    )
    p.add_argument(
        "--results", metavar="URL", help="with --queue sqs://...: redis://HOST:PORT/DB for results"
    )
    p.add_argument("--host", help="address to listen on (127.0.0.1)")
    p.add_argument("--port", help="port to listen on (8000)")
    p.add_argument("--ranks", metavar="N|auto", help="processes on this node (auto: one a GPU)")
    p.add_argument("--device", metavar="auto|cpu|cuda", help="where the models run")
    p.add_argument("--dtype", metavar="auto|float32|bfloat16|float16|int8", help="of the weights")
    p.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="NAME[=PATH]",
        help="model to serve; repeatable. PATH: our checkpoint directory, a Hugging Face GPT-2 "
        "directory, or a nanoGPT ckpt.pt; without it NAME is one of configs/models/",
    )
    p.add_argument("--log-level", metavar="debug|info|warning|error")
    p.add_argument("--nnodes", help="machines in the cluster (1)")
    p.add_argument("--node-rank", help="number of this machine, from 0")
    p.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="of machine 0, the same on all")
    return p


def config_file(argv: Sequence[str]) -> str | None:
    """The file that `parse` reads, if there is one. Raises ConfigError."""
    file: str | None = vars(parser().parse_args(argv)).get("config")
    return file or os.environ.get("NANOGPT_CONFIG")


def parse(argv: Sequence[str], environ: dict[str, str] | None = None) -> ServeConfig:
    """Options, variables and file as one configuration. Raises ConfigError."""
    given: dict[str, Any] = vars(parser().parse_args(argv))
    file = given.pop("config", None)
    shared = {"url": given.pop("queue", None), "results": given.pop("results", None)}
    if shared := {name: url for name, url in shared.items() if url is not None}:
        given["queue"] = shared
    return config.load(given, dict(os.environ) if environ is None else environ, file)


def parse_or_exit(argv: Sequence[str]) -> ServeConfig:
    """As `parse`; a mistake is one line on stderr and exit code 2."""
    try:
        return parse(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
