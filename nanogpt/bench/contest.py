"""Several servers under the same load, turn by turn, and what their figures are to one another.

On a machine that others use, the same measurement differs by tens of percent from one minute to the
next; the ratio of two that are taken side by side does not. So each round gives every server the
same prompts, one server after the other, and only ratios are told as results.
"""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from nanogpt.bench.load import Round
from nanogpt.bench.stats import Metric, Report, report, times_of
from nanogpt.bench.target import Target
from nanogpt.bench.workload import Workload

RunRound = Callable[[Target, Workload, int, str], Round]

# What is compared, by its name in tables; of times the metric.
FIGURES: dict[str, Metric | None] = {
    "output tokens/s": None,
    "TTFT ms": "ttft",
    "TPOT ms": "tpot",
    "end to end ms": "e2e",
}


class Figure(msgspec.Struct, frozen=True):
    """One figure of one server, against the first server's. Times are medians of a round."""

    median: float  # over the rounds
    low: float
    high: float
    ratio: float  # of the medians: this server over the first
    ratio_low: float  # of the two in one round, the lowest
    ratio_high: float


class Standing(msgspec.Struct, frozen=True):
    """One server in one workload."""

    server: str
    figures: dict[str, Figure]
    report: Report


class Comparison(msgspec.Struct, frozen=True):
    workload: str
    servers: list[Standing]


def compare(
    targets: Sequence[Target], workload: Workload, rounds: int, seed: int, run: RunRound
) -> Comparison:
    """Alternate: A B A B ... Each round has its own prompts, the same for all servers."""
    done: dict[str, list[Round]] = {target.name: [] for target in targets}
    for number in range(rounds):
        for target in targets:
            label = f"{workload.name} {number + 1}/{rounds} {target.name}"
            done[target.name].append(run(target, workload, seed + number, label))
    first = [_figures(one) for one in done[targets[0].name]]
    standings = []
    for target in targets:
        own = [_figures(one) for one in done[target.name]]
        standings.append(
            Standing(
                target.name,
                {name: f for name in FIGURES if (f := _figure(name, own, first)) is not None},
                report(str(workload), done[target.name]),
            )
        )
    return Comparison(str(workload), standings)


def _figures(one: Round) -> dict[str, float]:
    """Those of one round; without the ones that it has not."""
    good = [o for o in one.outcomes if o.ok]
    if not good:
        return {}
    times = times_of(good)
    found = {name: times[m].p50 for name, m in FIGURES.items() if m is not None and m in times}
    return {"output tokens/s": one.tokens_per_s, **found}


def _figure(
    name: str, own: Sequence[dict[str, float]], first: Sequence[dict[str, float]]
) -> Figure | None:
    """None when a round of either server lacks it."""
    if not all(name in one for one in (*own, *first)):
        return None
    values, base = [one[name] for one in own], [one[name] for one in first]
    if min(base) <= 0:
        return None
    each = [mine / theirs for mine, theirs in zip(values, base, strict=True)]
    median = statistics.median(values)
    return Figure(
        median=median,
        low=min(values),
        high=max(values),
        ratio=median / statistics.median(base),
        ratio_low=min(each),
        ratio_high=max(each),
    )
