"""Measures speed. Each subcommand prints tables, and as its last line one JSON object.

serve     load over HTTP on any OpenAI-compatible server: latencies, throughput, goodput
  compare   servers, or commits of this repository, side by side, taking turns: ratios
  engine    our engine without HTTP: prefill and decode sweeps, share of the roofline
  frontend  our front end with a generator of tokens in place of engines: what it carries
  scaling   tokens a second by choices of a request and by ranks
  switching requests to several models by turns, against each model alone
  memory    what fits on a device: bytes of KV a token, contexts at once
  jobs      stores of jobs, calls through a queue, batches: what the durable path costs
"""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from nanogpt.bench import compare, engine, frontend, jobs, memory, scaling, serve, switching
from nanogpt.bench.options import Parser
from nanogpt.config import nearest
from nanogpt.errors import ConfigError, StartupError

COMMANDS = (serve, compare, engine, frontend, scaling, switching, memory, jobs)


def parser() -> Parser:
    made = Parser(
        prog="python -m nanogpt.bench",
        description=__doc__,
        epilog="dev/BENCHMARKS.md explains each, and how to compare with other servers.",
    )
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args, unknown = parser().parse_known_args(argv)
        if unknown:
            known = [s for action in args.parser._actions for s in action.option_strings]
            word = unknown[0].partition("=")[0]
            raise ConfigError(f"unknown option {word!r}{nearest(word, known)}")
        return int(args.run(args))
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """As Ctrl-C does: servers that were started are stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(main())
