"""`serve`: one server under load."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from nanogpt.bench import output
from nanogpt.bench.load import OnOutcome, Round, run_round, warm_up
from nanogpt.bench.options import COUNT, add_load_options, workloads
from nanogpt.bench.outcome import Outcome
from nanogpt.bench.stats import METRICS, Report, Spread, report
from nanogpt.bench.table import Cell, table
from nanogpt.bench.target import Target, find_target
from nanogpt.bench.workload import Workload
from nanogpt.errors import StartupError

BUSY_CLIENT = 0.8  # of a core: above it times are the client's as well
_WARM_UP_SEED = 1_000_000_007

EXAMPLES = """\
examples:
  python -m nanogpt.bench serve --url http://127.0.0.1:8000/v1 --workload W1,W2,W3
  python -m nanogpt.bench serve --url http://127.0.0.1:8000/v1 --concurrency 32 --duration 30 \\
      --prompt-len uniform:16:512 --output-len 64 --shared-prefix 16
  python -m nanogpt.bench serve --url http://127.0.0.1:8000/v1 --rate 4 --requests 200 \\
      --goodput ttft=500 --goodput tpot=50 --plot load.png
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "serve",
        help="load on any OpenAI-compatible server",
        description="Send a workload to /completions of an OpenAI-compatible server and report "
        "latencies, throughput and errors.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="its name there (the only one)")
    parser.add_argument("--api-key", default="", metavar="KEY")
    parser.add_argument(
        "--rounds", type=COUNT, default=1, metavar="N", help="runs of each workload (1)"
    )
    add_load_options(parser)
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    output.check_plot(args.plot)
    loads = workloads(args)
    target = find_target(
        args.url,
        model=args.model,
        api_key=args.api_key,
        vocab_size=args.vocab_size,
        timeout_s=args.timeout,
    )
    print(f"{target.url} model {target.model}", flush=True)
    reports = []
    for workload in loads:
        warm(target, workload, args.warmup)  # all of them first: a mistake is told at once
    for workload in loads:
        rounds = [
            watched_round(target, workload, args.seed + number, f"{workload.name} {number + 1}")
            for number in range(args.rounds)
        ]
        reports.append(report(str(workload), rounds, args.goodput))
        print(f"\n{describe(reports[-1])}", flush=True)
    output.save_plot(args.plot, 2, lambda axes: _draw(axes, reports))
    output.emit("serve", args, reports)
    return 0 if all(r.failed < r.requests for r in reports) else 1


def warm(target: Target, workload: Workload, count: int | None) -> None:
    """First requests pay for allocations and compiled kernels. Raises StartupError if all fail."""
    outcomes = warm_up(target, workload, workload.burst if count is None else count, _WARM_UP_SEED)
    if outcomes and not any(o.ok for o in outcomes):
        first = outcomes[0]
        raise StartupError(
            f"{target.url} can't do {workload.name}: {first.status or 'no answer'}: "
            f"{first.error:.300}"
        )


def watched_round(target: Target, workload: Workload, seed: int, label: str) -> Round:
    """A round under a progress bar."""
    with _progress(workload, label) as on_outcome:
        return run_round(target, workload, seed, on_outcome)


@contextlib.contextmanager
def _progress(workload: Workload, label: str) -> Iterator[OnOutcome]:
    with tqdm(total=workload.requests, desc=label, unit="req", file=sys.stderr, leave=False) as bar:
        tokens = failed = 0

        def on_outcome(outcome: Outcome) -> None:
            nonlocal tokens, failed
            tokens += outcome.output_tokens
            failed += not outcome.ok
            bar.set_postfix(tokens=tokens, failed=failed, refresh=False)
            bar.update()

        yield on_outcome


def describe(r: Report) -> str:
    """A report for people."""
    lines = [
        r.workload,
        f"{r.requests - r.failed} of {r.requests} requests in {r.seconds:.2f} s, {r.rounds} "
        f"round{'s' if r.rounds > 1 else ''}; {r.output_tokens:,} output tokens, counted by "
        f"{' and '.join(r.counted_by) or 'nobody'}",
        f"{r.output_tokens_per_s} output tokens/s, {r.requests_per_s} requests/s",
    ]
    if r.goodput:
        limits = ", ".join(f"{name} {ms:g} ms" for name, ms in r.goodput.limits_ms.items())
        lines.append(
            f"goodput within {limits}: {r.goodput.requests_per_s:.2f} requests/s, "
            f"{r.goodput.share:.1%} of the requests"
        )
    if r.failed:
        kinds = ", ".join(f"{count} x {status}" for status, count in r.errors.items())
        lines.append(f"{r.failed} failed ({kinds}); the first: {r.first_error:.300}")
    lines.append(times_table(r.times_ms))
    busy = " (too busy: the figures are partly its own)" if r.client_cpu > BUSY_CLIENT else ""
    lines.append(f"this client took {r.client_cpu:.0%} of one core{busy}")
    return "\n".join(lines)


def times_table(times_ms: dict[str, Spread]) -> str:
    rows: list[list[Cell]] = [
        [text, s.mean, s.p50, s.p95, s.p99, s.max]
        for name, text in METRICS.items()
        if (s := times_ms.get(name)) is not None
    ]
    return table(["ms", "mean", "p50", "p95", "p99", "max"], rows)


def _draw(axes: Sequence, reports: Sequence[Report]) -> None:
    names = [r.workload.partition(":")[0] for r in reports]
    rates = [r.output_tokens_per_s for r in reports]
    axes[0].bar(
        names,
        [rate.median for rate in rates],
        yerr=[
            [rate.median - rate.low for rate in rates],
            [rate.high - rate.median for rate in rates],
        ],
        capsize=4,
    )
    axes[0].set_ylabel("output tokens/s (median; lowest and highest round)")
    width = 0.8 / len(METRICS)
    for number, (metric, text) in enumerate(METRICS.items()):
        found = [(i, r.times_ms[metric]) for i, r in enumerate(reports) if metric in r.times_ms]
        axes[1].bar(
            [i + number * width for i, _ in found], [s.p50 for _, s in found], width, label=text
        )
        axes[1].plot([i + number * width for i, _ in found], [s.p99 for _, s in found], "k_")
    axes[1].set_xticks([i + 1.5 * width for i in range(len(names))], names)
    axes[1].set(yscale="log", ylabel="ms (bar p50, mark p99)")
    axes[1].legend(fontsize=8)
