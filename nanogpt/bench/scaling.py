"""`scaling`: tokens a second by choices of a request and by ranks."""

import argparse
from collections.abc import Sequence

import msgspec

from nanogpt.bench import output, revisions
from nanogpt.bench.managed import stopping
from nanogpt.bench.options import COUNT, number, numbers
from nanogpt.bench.serve import warm, watched_round
from nanogpt.bench.stats import Rate
from nanogpt.bench.table import Cell, table
from nanogpt.bench.target import Target, find_target
from nanogpt.bench.workload import Lengths, Workload
from nanogpt.config import PROJECT
from nanogpt.errors import ConfigError

EXAMPLES = """\
One request at a time, with n choices. With --launch our own server is started for each number of
ranks, one after the other: two at once would share the GPUs. So on a shared machine compare only
figures of the same number of ranks, or use `compare` with two commands.

examples:
  python -m nanogpt.bench scaling --url http://127.0.0.1:8000/v1
  python -m nanogpt.bench scaling --launch '--model gpt2=/models/gpt2' --ranks 1,2,4 \\
      --n 1,4,16,64 --prompt-len 256 --plot scaling.png
"""


class Point(msgspec.Struct, frozen=True):
    ranks: int | None  # None: of a server that was running
    n: int
    tokens_per_s: Rate
    speedup: float  # against the first number of ranks, at the same n


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "scaling",
        help="tokens a second by n and by ranks",
        description="Measure one request with n choices, for several n and numbers of ranks.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--url", help="a server that is running, with the ranks it has")
    parser.add_argument("--model", default="", help="its name there (the only one)")
    parser.add_argument("--api-key", default="", metavar="KEY")
    parser.add_argument(
        "--launch", metavar="OPTIONS", help="start our server, with these options of launch.sh"
    )
    parser.add_argument(
        "--ranks", type=numbers, default=[1, 2], metavar="1,2,...", help="with --launch (1,2)"
    )
    parser.add_argument(
        "--n", type=numbers, default=[1, 4, 16, 64], metavar="1,4,...", help="choices (1,4,16,64)"
    )
    parser.add_argument("--prompt-len", type=Lengths.parse, default=Lengths(32, 32), metavar="LEN")
    parser.add_argument(
        "--output-len", type=Lengths.parse, default=Lengths(128, 128), metavar="LEN", help="(128)"
    )
    parser.add_argument("--rounds", type=COUNT, default=3, metavar="N", help="of each n (3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (0)")
    parser.add_argument(
        "--start-timeout", type=number(float, 1), default=300.0, metavar="S", help="(300)"
    )
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    output.check_plot(args.plot)
    if (args.url is None) == (args.launch is None):
        raise ConfigError("give --url for a running server, or --launch '' to start ours")
    if max(args.n) > 128:
        raise ConfigError("--n: a request has at most 128 choices")
    if args.url is not None:
        found: dict[int | None, dict[int, Rate]] = {None: _measure(args, _find(args, args.url), "")}
    else:
        found = {ranks: _launched(args, ranks) for ranks in args.ranks}
    points = _points(found)
    print(_table(points), flush=True)
    output.save_plot(args.plot, 1, lambda axes: _draw(axes, points))
    output.emit("scaling", args, points)
    return 0


def _find(args: argparse.Namespace, url: str) -> Target:
    return find_target(url, model=args.model, api_key=args.api_key)


def _launched(args: argparse.Namespace, ranks: int) -> dict[int, Rate]:
    server, url = revisions.launch(f"{ranks} ranks", PROJECT, f"{args.launch} --ranks {ranks}")
    with stopping([server]):
        server.wait(args.start_timeout, args.api_key)
        return _measure(args, _find(args, url), f"{ranks} ranks, ")


def _measure(args: argparse.Namespace, target: Target, label: str) -> dict[int, Rate]:
    """Tokens a second for each n."""
    found = {}
    for n in args.n:
        workload = Workload(
            name=f"n {n}",
            concurrency=1,
            requests=1,
            prompt=args.prompt_len,
            output=args.output_len,
            n=n,
        )
        warm(target, workload, None)
        rounds = [
            watched_round(target, workload, args.seed + i, f"{label}n {n}, {i + 1}")
            for i in range(args.rounds)
        ]
        for one in rounds:
            one.check()
        found[n] = Rate.of([one.tokens_per_s for one in rounds])
    return found


def _points(found: dict[int | None, dict[int, Rate]]) -> list[Point]:
    first = next(iter(found.values()))
    return [
        Point(ranks, n, rate, rate.median / first[n].median)
        for ranks, rates in found.items()
        for n, rate in rates.items()
    ]


def _name(ranks: int | None) -> str:
    return "tokens/s" if ranks is None else f"{ranks} rank{'s' if ranks > 1 else ''}"


def _table(points: Sequence[Point]) -> str:
    columns = list(dict.fromkeys(p.ranks for p in points))
    rows: list[list[Cell]] = []
    for n in dict.fromkeys(p.n for p in points):
        cells: list[Cell] = [f"n {n}"]
        for p in (p for p in points if p.n == n):
            speedup = "" if p.ranks == columns[0] else f", x {p.speedup:.2f}"
            cells.append(f"{p.tokens_per_s}{speedup}")
        rows.append(cells)
    return table(["", *map(_name, columns)], rows)


def _draw(axes: Sequence, points: Sequence[Point]) -> None:
    for ranks in dict.fromkeys(p.ranks for p in points):
        own = [p for p in points if p.ranks == ranks]
        axes[0].plot([p.n for p in own], [p.tokens_per_s.median for p in own], "o-")
        axes[0].lines[-1].set_label(_name(ranks))
    axes[0].set(xscale="log", yscale="log", xlabel="choices (n)", ylabel="output tokens/s")
    axes[0].legend(fontsize=8)
