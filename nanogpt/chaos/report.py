"""A run's figures: a table for people, one JSON object for programs."""

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

from nanogpt.chaos.check import Books, cause, settled
from nanogpt.chaos.history import Asked, Fault


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, 95th percentile (nearest rank) and greatest, in seconds; None without values."""
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    return {"p50": at(0.5), "p95": at(0.95), "max": at(1.0)}


def pause(fault: Fault, asked: list[Asked]) -> float | None:
    """The longest silence that any client with an open stream saw; None when there was none."""
    end = fault.healed if fault.healed is not None else fault.at
    longest = 0.0
    for one in asked:
        if not one.stream or one.behaviour != "reads":
            continue
        if one.sent > fault.at or one.ended < fault.at or not one.chunks:
            continue
        times = [chunk.at for chunk in one.chunks]
        for before, after in pairwise(times):
            if after > fault.at and before < end:
                longest = max(longest, after - before)
    return longest or None


def figures(books: Books) -> dict[str, Any]:
    """What a run measured. Recovery is the time from a fault to the first token that the cluster
    as it came back has generated; beyond loading: less the slowest loading of the models."""
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for fault in books.faults:
        kinds[fault.kind].append(fault)
    ordered = sorted(books.faults, key=lambda fault: fault.number)
    clean = {f.number for f in ordered[:1]}
    clean |= {f.number for before, f in pairwise(ordered) if before.healed is not None}
    causes = settled(books.faults)
    outcomes = Counter(_outcome(asked, causes) for asked in books.asked)
    done = [asked for asked in books.asked if asked.outcome == "complete"]
    return {
        "requests": len(books.asked),
        "outcomes": dict(sorted(outcomes.items())),
        "statuses": dict(sorted(Counter(str(a.status) for a in books.asked).items())),
        "tokens": sum(books.expected[a.template]["usage"]["completion_tokens"] for a in done),
        "faults": len(books.faults),
        "by_fault": {kind: _of_kind(ones, books.asked, clean) for kind, ones in kinds.items()},
    }


def _outcome(asked: Asked, faults: list[Fault]) -> str:
    """And why, where that is known: "refused: starting", "broken: kill-worker"."""
    why = cause(asked, faults)
    return f"{asked.outcome}: {why}" if why else asked.outcome


def _of_kind(faults: list[Fault], asked: list[Asked], clean: set[int]) -> dict[str, Any]:
    """`clean`: numbers of the faults that struck when those before them had been recovered from.
    Only their times are their own."""
    faults, count = [fault for fault in faults if fault.number in clean], len(faults)
    recoveries = [(f.healed - f.at, f.loading_s) for f in faults if f.healed is not None]
    return {
        "count": count,
        "pause_s": spread([p for f in faults if (p := pause(f, asked)) is not None]),
        "recovery_s": spread([total for total, _ in recoveries]),
        "beyond_loading_s": spread([total - loading for total, loading in recoveries]),
    }


def table(result: dict[str, Any]) -> str:
    """The figures by kind of fault."""

    def cell(values: dict[str, float] | None) -> str:
        return "-" if values is None else "/".join(f"{v:.1f}" for v in values.values())

    rows = [("fault", "count", "longest pause, s", "recovery, s", "beyond loading, s")]
    for kind, row in result["by_fault"].items():
        cells = [cell(row[name]) for name in ("pause_s", "recovery_s", "beyond_loading_s")]
        rows.append((kind, str(row["count"]), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    outcomes = [f"{count:>7} {name}" for name, count in result["outcomes"].items()]
    requests = f"{result['requests']} requests, of them"
    return "\n".join([*lines, "(median/95th percentile/greatest)", requests, *outcomes])
