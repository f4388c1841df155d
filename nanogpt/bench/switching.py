"""`switching`: what it costs a request that the one before it was for another model."""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from nanogpt.bench import output
from nanogpt.bench.load import run_round, warm_up
from nanogpt.bench.options import COUNT
from nanogpt.bench.stats import MS
from nanogpt.bench.table import Cell, table
from nanogpt.bench.target import Target, find_target
from nanogpt.bench.workload import Lengths, Workload

EXAMPLES = """\
One request at a time, on a running server that has the models in memory. In each round each model
gets a number of requests in a row, then all of them get as many by turns; in the next round it is
the other way about. Prompts are of one length, and no two are equal for a model.

examples:
  python -m nanogpt.bench switching --url http://127.0.0.1:8000/v1 --models gpt2,shakespeare-char
"""


class Switching(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of the time of whole requests to one model, in milliseconds."""

    model: str
    requests: int  # of each kind
    in_a_row_ms: float
    by_turns_ms: float
    added_ms: float  # median over the rounds of the difference of their medians
    lowest_ms: float  # of these differences
    highest_ms: float


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "switching",
        help="requests to several models by turns, against each model alone",
        description="Measure what switching between models in memory adds to a request.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--url", required=True, help="a server that is running")
    parser.add_argument(
        "--models", type=_names, required=True, metavar="A,B,...", help="two or more that it has"
    )
    parser.add_argument("--api-key", default="", metavar="KEY")
    parser.add_argument("--prompt-len", type=Lengths.parse, default=Lengths(32, 32), metavar="LEN")
    parser.add_argument(
        "--output-len", type=Lengths.parse, default=Lengths(32, 32), metavar="LEN", help="(32)"
    )
    parser.add_argument(
        "--requests", type=COUNT, default=20, metavar="N", help="to each model in a row (20)"
    )
    parser.add_argument("--rounds", type=COUNT, default=10, metavar="N", help="(10)")
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) < max(2, len(names)):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give two or more different models")
    return names


def run(args: argparse.Namespace) -> int:
    output.check_plot(args.plot)
    targets = [find_target(args.url, model=name, api_key=args.api_key) for name in args.models]
    one = Workload(
        name="one", concurrency=1, requests=1, prompt=args.prompt_len, output=args.output_len
    )
    for target in targets:
        warm_up(target, one, 3, 0)
    rounds = [_round(targets, one, args.requests, number) for number in range(args.rounds)]
    found = [_compare(target.model, rounds, args.requests) for target in targets]
    print(_table(found), flush=True)
    output.save_plot(args.plot, 1, lambda axes: _draw(axes, found))
    output.emit("switching", args, found)
    return 0


Times = dict[str, list[float]]  # seconds of whole requests, by model


def _round(
    targets: Sequence[Target], one: Workload, requests: int, number: int
) -> tuple[Times, Times]:
    """(In a row, by turns). No two prompts are equal: the prefix cache is not measured."""
    in_a_row = [target for target in targets for _ in range(requests)]
    by_turns = [*targets] * requests
    if number % 2:
        turns = _times(by_turns, one, 2 * number)
        return _times(in_a_row, one, 2 * number + 1), turns
    row = _times(in_a_row, one, 2 * number)
    return row, _times(by_turns, one, 2 * number + 1)


def _times(order: Sequence[Target], one: Workload, part: int) -> Times:
    found: Times = defaultdict(list)
    for target in order:
        seed = part * len(order) + len(found[target.model])
        answered = run_round(target, one, seed)
        answered.check()
        (outcome,) = answered.outcomes
        found[target.model].append(outcome.e2e_s)
    return found


def _compare(model: str, rounds: Sequence[tuple[Times, Times]], requests: int) -> Switching:
    median = statistics.median
    added = [MS * (median(turns[model]) - median(row[model])) for row, turns in rounds]
    return Switching(
        model=model,
        requests=len(rounds) * requests,
        in_a_row_ms=MS * median(s for row, _ in rounds for s in row[model]),
        by_turns_ms=MS * median(s for _, turns in rounds for s in turns[model]),
        added_ms=median(added),
        lowest_ms=min(added),
        highest_ms=max(added),
    )


def _table(found: Sequence[Switching]) -> str:
    rows: list[list[Cell]] = [
        [s.model, s.in_a_row_ms, s.by_turns_ms, s.added_ms, s.lowest_ms, s.highest_ms]
        for s in found
    ]
    return table(["ms", "in a row", "by turns", "added", "lowest", "highest"], rows)


def _draw(axes: Sequence, found: Sequence[Switching]) -> None:
    places = range(len(found))
    axes[0].bar([p - 0.2 for p in places], [s.in_a_row_ms for s in found], 0.4, label="in a row")
    axes[0].bar([p + 0.2 for p in places], [s.by_turns_ms for s in found], 0.4, label="by turns")
    axes[0].set_xticks(list(places), [s.model for s in found])
    axes[0].set_ylabel("ms of a request (median)")
    axes[0].legend(fontsize=8)
