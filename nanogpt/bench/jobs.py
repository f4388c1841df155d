"""`jobs`: what the durable path costs."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanogpt.bench import job_serving, job_stores, output
from nanogpt.bench.job_serving import Batches, Calls
from nanogpt.bench.job_stores import CREDENTIALS, StoreRates
from nanogpt.bench.options import COUNT, number, numbers
from nanogpt.bench.table import table
from nanogpt.errors import ConfigError, StartupError
from nanogpt.jobs_config import QueueConfig

KINDS = ("sqlite", "redis", "sqs")

EXAMPLES = """\
Redis flushes every write, as SQLite does. SQS is moto's stand-in in Python: its figures show that
it works, and nothing of Amazon's. The servers that take turns are up at the same time.

examples:
  python -m nanogpt.bench jobs
  python -m nanogpt.bench jobs --store sqlite,redis --model gpt2=/models/gpt2 --rounds 5
  python -m nanogpt.bench jobs --part stores --threads 1,16,64
"""
PARTS = ("stores", "calls", "batch")


def _listed(known: Sequence[str], text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r:.40} is none of {', '.join(known)}")
    return [name for name in known if name in found]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "jobs",
        help="stores of jobs, calls through a queue, batches",
        description="Measure stores of jobs, and our server with and without a queue.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--store",
        type=lambda text: _listed(KINDS, text),
        default=list(KINDS),
        metavar="S1,...",
        help=f"({','.join(KINDS)})",
    )
    parser.add_argument(
        "--part",
        type=lambda text: _listed(PARTS, text),
        default=list(PARTS),
        metavar="P1,...",
        help=f"({','.join(PARTS)})",
    )
    stores = parser.add_argument_group("stores")
    stores.add_argument("--threads", type=numbers, default=[1, 16], metavar="N,...", help="(1,16)")
    stores.add_argument(
        "--seconds", type=number(float, 0.1), default=3.0, metavar="S", help="of each figure (3)"
    )
    servers = parser.add_argument_group("servers")
    servers.add_argument(
        "--model", default="shakespeare-char", metavar="NAME[=PATH]", help="as for launch.sh"
    )
    servers.add_argument("--calls", type=COUNT, default=60, metavar="N", help="of each server (60)")
    servers.add_argument(
        "--output-len", type=COUNT, default=16, metavar="N", help="tokens of a call (16)"
    )
    servers.add_argument("--lines", type=COUNT, default=1000, metavar="N", help="of a batch (1000)")
    servers.add_argument(
        "--line-len", type=COUNT, default=128, metavar="N", help="tokens of a line (128)"
    )
    servers.add_argument("--rounds", type=COUNT, default=3, metavar="N", help="of batches (3)")
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    output.check_plot(args.plot)
    if args.part == ["calls"] and args.store == ["sqlite"]:
        raise ConfigError("--part calls needs a queue: --store redis or sqs")
    rates: list[StoreRates] = []
    calls: list[Calls] = []
    batches: list[Batches] = []
    with tempfile.TemporaryDirectory(prefix="bench-jobs-") as name:
        folder = Path(name)
        with _backends(args.store, folder) as queues:
            if "stores" in args.part:
                rates = _stores(args, folder, queues)
                print(_rates_table(rates), flush=True)
            if "calls" in args.part:
                calls = _calls(args, folder, queues)
                print(f"\n{_calls_table(calls)}", flush=True)
            if "batch" in args.part:
                batches = _batches(args, folder, queues)
                print(f"\n{_batches_table(batches)}", flush=True)
    output.save_plot(args.plot, 1, lambda axes: _draw(axes, rates))
    output.emit("jobs", args, {"stores": rates, "calls": calls, "batches": batches})
    return 0


@contextlib.contextmanager
def _backends(kinds: Sequence[str], folder: Path) -> Iterator[dict[str, QueueConfig | None]]:
    """What is there of the stores, by name; what is not is said."""
    found: dict[str, QueueConfig | None] = {}
    with contextlib.ExitStack() as stack:
        if "sqs" in kinds:
            os.environ.update(CREDENTIALS)
        for kind in kinds:
            try:
                if kind == "sqlite":
                    found[kind] = None
                    continue
                queue = stack.enter_context(job_stores.redis(folder / f"redis-{kind}"))
                if kind == "sqs":
                    queue = stack.enter_context(job_stores.sqs(queue))
                found[kind] = queue
            except StartupError as error:
                print(f"{kind} is left out: {error}", file=sys.stderr)
        if not found:
            raise StartupError("there is no store to measure")
        yield found


def _stores(
    args: argparse.Namespace, folder: Path, queues: dict[str, QueueConfig | None]
) -> list[StoreRates]:
    found = []
    for name, queue in queues.items():
        with job_stores.opened(name, folder, queue) as store:
            for threads in args.threads:
                print(f"{name}, {threads} threads", file=sys.stderr)
                found.append(job_stores.measure(name, store, threads, args.seconds))
    return found


def _calls(
    args: argparse.Namespace, folder: Path, queues: dict[str, QueueConfig | None]
) -> list[Calls]:
    found = []
    with job_serving.serving(args.model, folder, None) as local:
        for name, queue in queues.items():
            if queue is not None:
                print(f"calls through {name}", file=sys.stderr)
                with job_serving.serving(args.model, folder, queue) as split:
                    found.append(job_serving.calls(name, local, split, args.calls, args.output_len))
    return found


def _batches(
    args: argparse.Namespace, folder: Path, queues: dict[str, QueueConfig | None]
) -> list[Batches]:
    found = []
    for name, queue in queues.items():
        print(f"batches in {name}", file=sys.stderr)
        with job_serving.serving(args.model, folder, queue) as target:
            found.append(
                job_serving.batches(
                    name, target, args.model, args.lines, args.line_len, args.rounds
                )
            )
    return found


def _rates_table(found: Sequence[StoreRates]) -> str:
    return table(
        ["store", "threads", "put/s", "get/s", "claim and complete/s"],
        [[r.store, r.threads, r.puts, r.gets, r.done] for r in found],
    )


def _calls_table(found: Sequence[Calls]) -> str:
    return table(
        ["calls through", "local ms", "split ms", "added ms", "p90", "ratio"],
        [[c.queue, c.local_p50, c.split_p50, c.added_p50, c.added_p90, c.ratio] for c in found],
    )


def _batches_table(found: Sequence[Batches]) -> str:
    return table(
        ["batch in", "tokens/s", "engine alone", "ratio"],
        [[b.queue, str(b.batch), str(b.engine), b.ratio] for b in found],
    )


def _draw(axes: Sequence, found: Sequence[StoreRates]) -> None:
    names = [f"{r.store} x {r.threads}" for r in found]
    for i, part in enumerate(("puts", "gets", "done")):
        places = [n + 0.25 * i for n in range(len(found))]
        axes[0].bar(places, [getattr(r, part) for r in found], 0.25, label=part)
    axes[0].set_xticks(range(len(found)), names, rotation=30)
    axes[0].set(yscale="log", ylabel="operations a second")
    axes[0].legend(fontsize=8)
