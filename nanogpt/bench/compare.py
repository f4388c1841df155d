"""`compare`: servers, or commits of this repository, side by side."""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nanogpt.bench import output, revisions
from nanogpt.bench.contest import FIGURES, Comparison, compare
from nanogpt.bench.entrants import Entrant, entrants_of
from nanogpt.bench.load import Round
from nanogpt.bench.managed import ManagedServer, stopping
from nanogpt.bench.options import COUNT, add_load_options, number, workloads
from nanogpt.bench.serve import warm, watched_round
from nanogpt.bench.table import Cell, show, table
from nanogpt.bench.target import Target, find_target
from nanogpt.bench.workload import Workload
from nanogpt.errors import ConfigError

IDLE_LOOK_S = 2.0
BUSY_IDLE = 0.05  # of a core: more, and the others are measured beside its noise

EXAMPLES = """\
Servers take turns: A B A B ..., the same prompts in each round. Ratios are those of the medians
over the rounds, with the lowest and highest ratio of one round; all are against the first server.
On a shared machine only ratios of one run mean anything. Servers that wait should not use the CPU;
what those that were started here take when idle is measured, and told.

examples:
  python -m nanogpt.bench compare --a http://127.0.0.1:8000/v1 --b http://127.0.0.1:8080/v1 \\
      --workload W1,W2,W3
  python -m nanogpt.bench compare --workload W2 --rounds 7 \\
      --a-command './launch.sh --port {port} --model gpt2=/models/gpt2' \\
      --b-command 'llama-server -m gpt2-bf16.gguf --port {port} -c 36864 -np 32'
  python -m nanogpt.bench compare --commits HEAD~1 . --launch '--model gpt2=/models/gpt2' \\
      --workload W1,W2
  python -m nanogpt.bench compare --workload W3 --server ours=http://127.0.0.1:8000/v1 \\
      --server llama=http://127.0.0.1:8080/v1 --server vllm=http://127.0.0.1:8001/v1,model=gpt2
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="servers or commits side by side, taking turns",
        description="Give two or more servers the same load, taking turns, and tell the ratios.",
        epilog=EXAMPLES,
    )
    who = parser.add_argument_group("servers")
    who.add_argument("--a", metavar="URL[,model=M]", help="the first: ratios are against it")
    who.add_argument("--b", metavar="URL[,model=M]")
    who.add_argument("--a-command", metavar="SHELL", help="starts it; {port} becomes a free port")
    who.add_argument("--b-command", metavar="SHELL")
    who.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="NAME=URL[,model=M]",
        help="any number of servers, in place of --a and --b; repeatable",
    )
    who.add_argument(
        "--command",
        action="append",
        default=[],
        metavar="NAME=SHELL",
        help="starts a server of that name; without a --server its {port} says where it is",
    )
    who.add_argument(
        "--commits",
        nargs="+",
        default=[],
        metavar="REV",
        help="commits of this repository (. is its files as they are), launched with --launch",
    )
    who.add_argument("--launch", default="", metavar="OPTIONS", help="of launch.sh, for --commits")
    who.add_argument("--api-key", default="", metavar="KEY", help="for all of them")
    parser.add_argument(
        "--rounds", type=COUNT, default=5, metavar="N", help="of each workload and server (5)"
    )
    parser.add_argument(
        "--start-timeout",
        type=number(float, 1),
        default=300.0,
        metavar="S",
        help="for a command to be ready (300)",
    )
    parser.add_argument(
        "--rest",
        type=number(float, 0),
        default=0.0,
        metavar="S",
        help="before each turn, for servers that spin for a while after their last request (0)",
    )
    add_load_options(parser)
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    def rested_round(target: Target, workload: Workload, seed: int, label: str) -> Round:
        time.sleep(args.rest)
        return watched_round(target, workload, seed, label)

    output.check_plot(args.plot)
    loads = workloads(args)
    started: list[ManagedServer] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stack.enter_context(stopping(started))
        entrants = _start(args, started, folder)
        targets = [_find(args, entrant) for entrant in entrants]
        for target in targets:
            print(f"{target.name}: {target.url} model {target.model}", flush=True)
            for load in loads:
                warm(target, load, args.warmup)
        idle = _idle_cpu(started)
        results = []
        for load in loads:
            results.append(compare(targets, load, args.rounds, args.seed, rested_round))
            print(f"\n{describe(results[-1])}", flush=True)
    output.save_plot(args.plot, len(FIGURES), lambda axes: _draw(axes, results))
    output.emit("compare", args, {"comparisons": results, "idle_cpu": idle})
    return 0 if all(not s.report.failed for c in results for s in c.servers) else 1


def _start(args: argparse.Namespace, started: list[ManagedServer], folder: Path) -> list[Entrant]:
    """Start what is to be started, one after the other, until each is ready."""
    entrants = entrants_of(args)
    if len(entrants) + len(args.commits) < 2:
        raise ConfigError("two servers are needed: --a and --b, --server twice, or --commits")
    for entrant in entrants:
        if entrant.command:
            started.append(ManagedServer(entrant.name, entrant.command, entrant.url))
            started[-1].wait(args.start_timeout, args.api_key)
    for revision, name in zip(args.commits, revisions.names(args.commits), strict=True):
        path = revisions.check_out(revision, name, folder)
        server, url = revisions.launch(name, path, args.launch)
        started.append(server)
        server.wait(args.start_timeout, args.api_key)
        entrants.append(Entrant(name, url))
    return entrants


def _find(args: argparse.Namespace, entrant: Entrant) -> Target:
    return find_target(
        entrant.url,
        name=entrant.name,
        model=entrant.model,
        api_key=args.api_key,
        vocab_size=args.vocab_size,
        timeout_s=args.timeout,
    )


def _idle_cpu(servers: Sequence[ManagedServer]) -> dict[str, float]:
    """Share of a core that each takes when nobody asks for anything."""
    if not servers:
        return {}
    before = [server.cpu_s() for server in servers]
    for _ in tqdm(range(10), desc="idle", unit="look", leave=False):
        time.sleep(IDLE_LOOK_S / 10)
    shares = {
        server.name: (server.cpu_s() - was) / IDLE_LOOK_S
        for server, was in zip(servers, before, strict=True)
    }
    for name, share in shares.items():
        note = ": it disturbs the others" if share > BUSY_IDLE else ""
        print(f"{name} takes {share:.1%} of a core when idle{note}", flush=True)
    return shares


# What is told


def describe(c: Comparison) -> str:
    """Tables for people: values, then ratios."""
    first = c.servers[0].server
    names = [name for name in FIGURES if any(name in s.figures for s in c.servers)]
    rows: list[list[Cell]] = []
    for standing in c.servers:
        found = [standing.figures.get(name) for name in names]
        rows.append(
            [
                standing.server,
                *(
                    f"{show(f.median)} ({show(f.low)} to {show(f.high)})" if f else None
                    for f in found
                ),
            ]
        )
        if standing.server != first:
            rows.append(
                [
                    f"  / {first}",
                    *(
                        f"{f.ratio:.2f} ({f.ratio_low:.2f} to {f.ratio_high:.2f})" if f else None
                        for f in found
                    ),
                ]
            )
    lines = [f"{c.workload}, {c.servers[0].report.rounds} rounds", table(["", *names], rows)]
    for standing in c.servers:
        r = standing.report
        if r.failed:
            lines.append(
                f"{standing.server}: {r.failed} of {r.requests} failed: {r.first_error:.200}"
            )
        if r.counted_by != ["usage"]:
            lines.append(
                f"{standing.server}: tokens counted by {' and '.join(r.counted_by) or '-'}"
            )
    busy = max(standing.report.client_cpu for standing in c.servers)
    lines.append(f"this client took at most {busy:.0%} of one core")
    return "\n".join(lines)


def _draw(axes: Sequence, results: Sequence[Comparison]) -> None:
    """Ratios against the first server, a panel for each figure."""
    names = [s.server for s in results[0].servers]
    width = 0.8 / len(names)
    for axis, figure in zip(axes, FIGURES, strict=True):
        for number_, name in enumerate(names):
            found = [
                (i, f)
                for i, c in enumerate(results)
                if (f := c.servers[number_].figures.get(figure)) is not None
            ]
            axis.bar(
                [i + number_ * width for i, _ in found],
                [f.ratio for _, f in found],
                width,
                yerr=[
                    [max(0.0, f.ratio - f.ratio_low) for _, f in found],
                    [max(0.0, f.ratio_high - f.ratio) for _, f in found],
                ],
                capsize=3,
                label=name,
            )
        axis.set_title(f"{figure}, against {names[0]}", fontsize=9)
        axis.set_xticks(
            [i + width * (len(names) - 1) / 2 for i in range(len(results))],
            [c.workload.partition(":")[0] for c in results],
        )
    axes[0].legend(fontsize=8)
