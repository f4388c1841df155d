"""Options that say what load to send: the same for `serve` and `compare`."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec

from nanogpt.bench.stats import Limit
from nanogpt.bench.workload import PRESETS, Lengths, Workload, presets
from nanogpt.errors import ConfigError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A mistake is a ConfigError, so that it becomes one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **settings,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the options)")


def number(
    kind: Callable[[str], T], least: float, most: float = float("inf")
) -> Callable[[str], T]:
    """A type for argparse: a number within bounds."""

    def parse(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number") from None
        if not least <= value <= most:  # type: ignore[operator]
            bounds = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {bounds}")
        return value

    return parse


def numbers(text: str) -> list[int]:
    """A type for argparse: "1,4,16"."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give numbers from 1 up, such as 1,4,16")
    return found


COUNT = number(int, 1)
DEFAULT_CONCURRENCY = 8
REQUESTS_A_STREAM = 10


def add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    listed = "; ".join(str(w) for w in PRESETS.values())
    load.add_argument(
        "--workload",
        metavar="W1,W2,...",
        help=f"presets, one after the other, in place of all the options below ({listed})",
    )
    load.add_argument(
        "--concurrency",
        type=COUNT,
        metavar="N",
        help=f"requests at a time ({DEFAULT_CONCURRENCY}); with --rate the most that are open",
    )
    load.add_argument(
        "--rate", type=number(float, 0.001), metavar="R", help="requests a second, Poisson arrivals"
    )
    load.add_argument(
        "--requests",
        type=COUNT,
        metavar="N",
        help=f"in a round ({REQUESTS_A_STREAM} x concurrency, unless there is a --duration)",
    )
    load.add_argument(
        "--duration", type=number(float, 0.1), metavar="S", help="send no more after S seconds"
    )
    load.add_argument(
        "--prompt-len", type=Lengths.parse, metavar="LEN", help="tokens: 32, or uniform:16:512 (32)"
    )
    load.add_argument(
        "--output-len", type=Lengths.parse, metavar="LEN", help="max_tokens, likewise (128)"
    )
    load.add_argument(
        "--shared-prefix",
        type=number(int, 0),
        metavar="N",
        help="the first N tokens of each prompt are the same for all of a round (0)",
    )
    load.add_argument("--n", type=number(int, 1, 128), metavar="N", help="choices a request (1)")
    load.add_argument("--temperature", type=number(float, 0, 2), metavar="T", help="(1)")
    load.add_argument(
        "--sampling-seed", type=int, metavar="N", help="the field `seed` of every request (none)"
    )
    every = parser.add_argument_group("load, also with --workload")
    every.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals (0)"
    )
    every.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    every.add_argument(
        "--ignore-eos", action="store_true", help="send ignore_eos (ours, vLLM, llama.cpp)"
    )
    every.add_argument(
        "--prompt-kind",
        choices=("tokens", "text"),
        default="tokens",
        help="random token ids, or random English words, one GPT-2 token each (tokens)",
    )
    every.add_argument(
        "--vocab-size",
        type=COUNT,
        metavar="N",
        help="token ids are below this (asked of the server, else GPT-2's 50257)",
    )
    every.add_argument(
        "--warmup",
        type=number(int, 0),
        metavar="N",
        help="requests before each workload that don't count (as many as run at once)",
    )
    every.add_argument(
        "--timeout", type=number(float, 0.1), default=600.0, metavar="S", help="a request (600)"
    )
    every.add_argument(
        "--goodput",
        type=Limit.parse,
        action="append",
        default=[],
        metavar="METRIC=MS",
        help="count requests within limits: ttft=500, tpot=50, itl=200, e2e=5000; repeatable",
    )


def workloads(args: argparse.Namespace) -> list[Workload]:
    """What the options ask for. Raises ConfigError."""
    shape = {
        "concurrency": args.concurrency,
        "rate": args.rate,
        "requests": args.requests,
        "duration_s": args.duration,
        "prompt": args.prompt_len,
        "output": args.output_len,
        "shared_prefix": args.shared_prefix,
        "n": args.n,
        "temperature": args.temperature,
        "sampling_seed": args.sampling_seed,
    }
    given = {name: value for name, value in shape.items() if value is not None}
    common = {
        "stream": not args.no_stream,
        "ignore_eos": args.ignore_eos,
        "prompt_kind": args.prompt_kind,
    }
    if args.workload is not None:
        if given:
            name = next(iter(given)).removesuffix("_s").replace("_", "-")
            raise ConfigError(f"--workload says everything: leave the option for {name} out")
        return [msgspec.structs.replace(workload, **common) for workload in presets(args.workload)]
    if args.rate is None:
        given.setdefault("concurrency", DEFAULT_CONCURRENCY)
    if args.requests is None and args.duration is None:
        given["requests"] = REQUESTS_A_STREAM * given.get("concurrency", DEFAULT_CONCURRENCY)
    return [Workload(**given, **common)]
