"""Command line of the chaos runs: see the package's docstring."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt.chaos.check import Books, violations
from nanogpt.chaos.cluster import ChaosCluster, ClusterError
from nanogpt.chaos.faults import DEFAULT, FAULTS
from nanogpt.chaos.history import Ended, History, read
from nanogpt.chaos.modes import MODES
from nanogpt.chaos.report import figures, table
from nanogpt.chaos.run import Load, consult_oracle

SHOWN = 20  # violations on the screen; the JSON object has their number, the history everything

# A small cache is soon full: choices are preempted and prefixes evicted all the time, and the
# memory of a rank reaches its size early. A loop that does not turn is noticed within seconds.
SETTINGS = {"NANOGPT_ENGINE_KV_MEMORY_GIB": "0.05", "NANOGPT_CLUSTER_STUCK_S": "5"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m nanogpt.chaos", description="Break a cluster, and check what clients see."
    )
    p.add_argument("mode", nargs="?", choices=list(MODES), default="faults")
    p.add_argument("--duration", type=float, default=60.0, metavar="S", help="seconds (60)")
    p.add_argument("--kills", type=int, default=10**9, metavar="N", help="at most N faults")
    p.add_argument(
        "--faults",
        type=_kinds,
        default=DEFAULT,
        metavar="KIND[=N],...",
        help="kinds, and how often each comes in a round, in random order; of: "
        f"{', '.join(FAULTS)} (default: all that break no connection, once)",
    )
    p.add_argument("--ranks", type=int, default=2, metavar="N")
    p.add_argument("--seed", type=int, default=1, help="of the requests and the faults (1)")
    p.add_argument("--requests-in-flight", type=int, default=8, metavar="N")
    p.add_argument("--templates", type=int, default=32, metavar="N", help="different requests (32)")
    p.add_argument("--directory", type=Path, help="for history and log (a temporary one)")
    return p.parse_args(argv)


def _kinds(text: str) -> tuple[str, ...]:
    """A round: each kind as often as the text says."""
    kinds: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        kind, _, times = part.partition("=")
        if kind not in FAULTS:
            raise argparse.ArgumentTypeError(f"unknown: {kind}; known: {', '.join(FAULTS)}")
        if times and not times.isdecimal():
            raise argparse.ArgumentTypeError(f"{part}: how often must be a number")
        kinds += [kind] * int(times or 1)
    if not kinds:
        raise argparse.ArgumentTypeError(f"no fault; known: {', '.join(FAULTS)}")
    return tuple(kinds)


def run(args: argparse.Namespace, directory: Path, history: History) -> dict[str, Any]:
    """Everything up to the last line of the history. Returns the mode's own figures."""
    cluster = ChaosCluster(args.ranks, directory, SETTINGS)
    crashed, extra = "", {}
    try:
        cluster.start()
        cluster.wait_ready()
        bodies = consult_oracle(cluster, history, args.seed, args.templates)
        load = Load(cluster, history, bodies, args.seed)
        extra = MODES[args.mode](cluster, history, load, args)
    except ClusterError as error:
        crashed = str(error)
    except KeyboardInterrupt:
        crashed = "interrupted"
    finally:
        code = cluster.stop()
        left = cluster.left_behind()
        history.add(Ended(at=time.monotonic(), exit_code=code, left_behind=left, crashed=crashed))
    return extra


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    directory = args.directory or Path(tempfile.mkdtemp(prefix="nanogpt-chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    history = History(directory / "history.jsonl")
    started = time.monotonic()
    extra = run(args, directory, history)
    history.close()
    books = Books.of(read(history.path))
    found = violations(books)
    result = {"mode": args.mode, "seed": args.seed, "ranks": args.ranks}
    result |= {"seconds": round(time.monotonic() - started, 1), **figures(books), **extra}
    print(table(result))
    for text in found[:SHOWN]:
        print(f"violation: {text}")
    keep = bool(found) or args.directory is not None
    if keep:
        print(f"history: {history.path}")
    else:
        shutil.rmtree(directory)
    print(json.dumps(result | {"violations": len(found)}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
