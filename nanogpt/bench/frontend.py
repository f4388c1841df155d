"""`frontend`: our front end alone, with engines replaced by a generator of tokens."""

import argparse
import asyncio
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from tqdm import tqdm

from nanogpt.bench import output
from nanogpt.bench.front_load import Streams, Whole, follow_streams, whole_answers
from nanogpt.bench.managed import ManagedServer, stopping
from nanogpt.bench.options import COUNT, number
from nanogpt.bench.stats import MS, Spread
from nanogpt.bench.table import Cell, table
from nanogpt.bench.target import Target, find_target
from nanogpt.config import PROJECT
from nanogpt.network import free_port

T = TypeVar("T")
START_S = 60.0

EXAMPLES = """\
The front end is the real one, and so are messages and sockets; only the rank makes its tokens out
of nothing, one for each choice in each step. Each token carries the time when it was made, so its
lag is known to half a millisecond. The client and the generator use the same cores.

examples:
  python -m nanogpt.bench frontend
  python -m nanogpt.bench frontend --streams 512 --rate 20 --seconds 10 --plot front.png
"""


class Carried(msgspec.Struct, frozen=True, kw_only=True):
    """One load. CPU is in shares of one core."""

    load: str
    tokens: int
    seconds: float
    tokens_per_s: float
    wanted_per_s: float | None  # what the generator was told to make; None: as much as possible
    tokens_per_chunk: float | None
    lag_ms: Spread | None
    front_end_cpu: float
    rank_cpu: float
    client_cpu: float


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "frontend",
        help="our front end alone: streams and tokens that it carries",
        description="Start the front end with a generator of tokens in place of the engines.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--streams", type=COUNT, default=512, metavar="N", help="open at once (512)"
    )
    parser.add_argument(
        "--rate",
        type=number(float, 0.1),
        default=20.0,
        metavar="R",
        help="tokens a second of each stream (20)",
    )
    parser.add_argument(
        "--seconds", type=number(float, 0.5), default=10.0, metavar="S", help="watched (10)"
    )
    whole = parser.add_argument_group("whole answers, as fast as it goes")
    whole.add_argument("--requests", type=COUNT, default=64, metavar="N", help="at once (64)")
    whole.add_argument("--n", type=number(int, 1, 128), default=8, help="choices of each (8)")
    whole.add_argument(
        "--output-len", type=COUNT, default=500, metavar="N", help="tokens of a choice (500)"
    )
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    output.check_plot(args.plot)
    found = [_whole(args), _streams(args)]
    print(_table(found), flush=True)
    output.save_plot(args.plot, 1, lambda axes: _draw(axes, found[1:]))
    output.emit("frontend", args, found)
    return 0


class _Front:
    """A front end and its generator, ready; with CPU times of both."""

    def __init__(self, server: ManagedServer, target: Target) -> None:
        self._server, self.target = server, target

    def measure(
        self, work: Coroutine[Any, Any, T], seconds: float, label: str
    ) -> tuple[T, dict[str, float]]:
        """Run it, and the share of a core that each took meanwhile."""
        front, rank = self._cpu()
        own, started = time.process_time(), time.monotonic()
        with tqdm(total=round(seconds) or None, desc=label, unit="s", leave=False) as bar:
            ticking = threading.Event()
            ticker = threading.Thread(target=_tick, args=(bar, ticking))
            ticker.start()
            try:
                result = asyncio.run(work)
            finally:
                ticking.set()
                ticker.join()
        elapsed = time.monotonic() - started
        front_after, rank_after = self._cpu()
        shares = {
            "front_end_cpu": (front_after - front) / elapsed,
            "rank_cpu": (rank_after - rank) / elapsed,
            "client_cpu": (time.process_time() - own) / elapsed,
        }
        return result, shares

    def _cpu(self) -> tuple[float, float]:
        front = self._server.cpu_s("frontend.py")
        return front, self._server.cpu_s() - front


def _tick(bar: tqdm, stop: threading.Event) -> None:
    while not stop.wait(1.0):
        bar.update()


def _streams(args: argparse.Namespace) -> Carried:
    def work(front: _Front) -> tuple[Streams, dict[str, float]]:
        return front.measure(
            follow_streams(front.target, args.streams, args.seconds), args.seconds + 4, "streams"
        )

    watched, shares = _with_front_end(args.rate, work)
    return Carried(
        load=f"{args.streams} streams",
        tokens=watched.tokens,
        seconds=watched.seconds,
        tokens_per_s=watched.tokens_per_s,
        wanted_per_s=args.streams * args.rate,
        tokens_per_chunk=watched.tokens / max(1, watched.chunks),
        lag_ms=Spread.of(lag * MS for lag in watched.lags_s),
        **shares,
    )


def _whole(args: argparse.Namespace) -> Carried:
    def work(front: _Front) -> tuple[Whole, dict[str, float]]:
        load = whole_answers(front.target, args.requests, args.n, args.output_len)
        return front.measure(load, 0, "whole answers")

    done, shares = _with_front_end(0.0, work)
    return Carried(
        load=f"{args.requests} whole answers, n {args.n}",
        tokens=done.tokens,
        seconds=done.seconds,
        tokens_per_s=done.tokens_per_s,
        wanted_per_s=None,
        tokens_per_chunk=None,
        lag_ms=None,
        **shares,
    )


def _with_front_end(rate: float, work: Callable[[_Front], T]) -> T:
    """Start front end and generator in a run directory of their own, and leave nothing."""
    started: list[ManagedServer] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, stopping(started):
        port = free_port()
        command = f"exec {shlex.quote(sys.executable)} -m nanogpt.bench.fake_rank {rate}"
        url = f"http://127.0.0.1:{port}/v1"
        environ = {
            "NANOGPT_RUN_DIR": folder,
            "NANOGPT_ADMISSION_STATE": ":memory:",
            "NANOGPT_JOBS_PATH": f"{folder}/jobs",
        }
        started.append(
            ManagedServer(
                "the front end", f"{command} --port {port}", url, cwd=PROJECT, environ=environ
            )
        )
        started[0].wait(START_S)
        return work(_Front(started[0], find_target(url)))


def _table(found: Sequence[Carried]) -> str:
    rows: list[list[Cell]] = []
    for c in found:
        lag = c.lag_ms
        times = [lag.p50, lag.p95, lag.p99, lag.max] if lag else [None] * 4
        cpu = [f"{share:.0%}" for share in (c.front_end_cpu, c.rank_cpu, c.client_cpu)]
        rows.append([c.load, c.tokens_per_s, c.wanted_per_s, c.tokens_per_chunk, *times, *cpu])
    lags = ["lag p50 ms", "p95", "p99", "max"]
    cpus = ["CPU: front end", "rank", "client"]
    return table(["", "tokens/s", "made/s", "per chunk", *lags, *cpus], rows)


def _draw(axes: Sequence, found: Sequence[Carried]) -> None:
    for number_, c in enumerate(found):
        if c.lag_ms:
            values = [c.lag_ms.p50, c.lag_ms.p95, c.lag_ms.p99, c.lag_ms.max]
            axes[0].bar([i + number_ * 0.4 for i in range(4)], values, 0.4, label=c.load)
    axes[0].set_xticks(range(4), ["p50", "p95", "p99", "max"])
    axes[0].set_ylabel("ms from making a token to receiving it")
    axes[0].legend(fontsize=8)
