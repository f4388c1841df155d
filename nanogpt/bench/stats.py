"""From outcomes of requests to the figures that people compare."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from nanogpt.bench.load import Round
from nanogpt.bench.outcome import CountedBy, Outcome
from nanogpt.errors import ConfigError

Metric = Literal["ttft", "tpot", "itl", "e2e"]
METRICS: dict[Metric, str] = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between chunks",
    "e2e": "end to end",
}
MS = 1000.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, with linear interpolation between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Spread(msgspec.Struct, frozen=True):
    """Of one kind of time, in milliseconds."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None when there are no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p95, p99 = (percentile(ordered, p) for p in (50, 95, 99))
        return cls(len(ordered), statistics.fmean(ordered), p50, p95, p99, ordered[-1])


class Rate(msgspec.Struct, frozen=True):
    """Over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Rate":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:,.1f}"
        return f"{self.median:,.1f} ({self.low:,.1f} to {self.high:,.1f})"


class Limit(msgspec.Struct, frozen=True):
    """What a request must keep to count for goodput, in milliseconds."""

    metric: Metric
    most_ms: float

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """ "ttft=500". Raises ConfigError."""
        name, _, value = text.partition("=")
        try:
            return msgspec.convert({"metric": name, "most_ms": float(value)}, cls)
        except (ValueError, msgspec.ValidationError):
            raise ConfigError(
                f"limit {text!r:.40}: give ttft=500, tpot=50, itl=200 or e2e=5000 (milliseconds)"
            ) from None

    def kept_by(self, outcome: Outcome) -> bool:
        """A time that could not be measured keeps no limit; of gaps the longest counts."""
        if self.metric == "itl":
            seconds = max(outcome.gaps_s(), default=0.0)
        else:
            value = getattr(outcome, f"{self.metric}_s")
            if value is None:
                return self.metric == "tpot" and bool(outcome.arrivals)
            seconds = value
        return seconds * MS <= self.most_ms


class Goodput(msgspec.Struct, frozen=True):
    limits_ms: dict[str, float]
    requests_per_s: float
    share: float  # of all requests, failed ones included


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One workload on one server, all rounds together."""

    workload: str
    rounds: int
    seconds: float
    requests: int
    failed: int
    errors: dict[str, int]  # by status ("no answer" without one)
    first_error: str
    prompt_tokens: int
    output_tokens: int
    counted_by: list[CountedBy]
    output_tokens_per_s: Rate
    requests_per_s: Rate
    times_ms: dict[str, Spread]
    goodput: Goodput | None
    client_cpu: float  # share of one core, the highest of the rounds


def report(workload: str, rounds: Sequence[Round], limits: Sequence[Limit] = ()) -> Report:
    outcomes = [o for one in rounds for o in one.outcomes]
    good = [o for o in outcomes if o.ok]
    bad = [o for o in outcomes if not o.ok]
    seconds = sum(one.seconds for one in rounds)
    return Report(
        workload=workload,
        rounds=len(rounds),
        seconds=seconds,
        requests=len(outcomes),
        failed=len(bad),
        errors=dict(Counter(str(o.status) if o.status else "no answer" for o in bad)),
        first_error=bad[0].error if bad else "",
        prompt_tokens=sum(o.prompt_tokens or 0 for o in good),
        output_tokens=sum(o.output_tokens for o in good),
        counted_by=sorted({o.counted_by for o in good}),
        output_tokens_per_s=Rate.of([one.tokens_per_s for one in rounds]),
        requests_per_s=Rate.of([one.requests_per_s for one in rounds]),
        times_ms=times_of(good),
        goodput=_goodput(outcomes, seconds, limits) if limits else None,
        client_cpu=max(one.client_cpu for one in rounds),
    )


def times_of(outcomes: Sequence[Outcome]) -> dict[str, Spread]:
    """By metric; without those that no outcome has."""
    seconds: dict[Metric, list[float]] = {
        "ttft": [t for o in outcomes if (t := o.ttft_s) is not None],
        "tpot": [t for o in outcomes if (t := o.tpot_s) is not None],
        "itl": [gap for o in outcomes for gap in o.gaps_s()],
        "e2e": [o.e2e_s for o in outcomes],
    }
    found = {name: Spread.of(value * MS for value in values) for name, values in seconds.items()}
    return {name: spread for name, spread in found.items() if spread is not None}


def _goodput(outcomes: Sequence[Outcome], seconds: float, limits: Sequence[Limit]) -> Goodput:
    kept = sum(o.ok and all(limit.kept_by(o) for limit in limits) for o in outcomes)
    return Goodput(
        limits_ms={limit.metric: limit.most_ms for limit in limits},
        requests_per_s=kept / seconds if seconds else 0.0,
        share=kept / len(outcomes) if outcomes else 0.0,
    )
