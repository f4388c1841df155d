"""The offline checker: from a history alone, whether the cluster kept its promises.

- Every accepted request has exactly one terminal answer, equal to the oracle's in text, tokens,
  finish_reason, usage and log probabilities; no stream misses, doubles or reorders a token.
- Whoever is refused gets 429 or 503 with Retry-After, and only before the request was accepted:
  while the server drains, or within REFUSED_S. Where there are faults, there is room for all: then
  nobody is refused but by a front end that is new, or on its way out.
- A connection breaks only when the process that holds it was killed, and has seen nothing wrong.
- The cluster recovers from every fault, ends with code 0, leaves no process behind, and its
  processes don't grow.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

import msgspec

from nanogpt.chaos.faults import ABSENT, BREAKING, UNREAD
from nanogpt.chaos.history import Asked, Ended, Expected, Fault, Line, Sample
from nanogpt.chaos.merge import Disorder, merged, whole

RACE_S = 1.0  # between a client's clock and the moment at which a fault takes effect
CODES_503 = {"overloaded", "draining", "starting"}
# What it may take to refuse a request, beside the time in which nobody could read it. All the waits
# of the server that end in 429 or 503 are later ones: http.queue_timeout_s (600 s) and
# residency.wait_s (120 s) begin when a request is accepted; only a reload holds requests before,
# for 30 s. So whoever hears of it later had been accepted, and was dropped. The latest of 28,322
# refusals in an overload and of 6,972 during starts came after 0.65 s.
REFUSED_S = 5.0
HELD_S = 30.0
MIN_SAMPLES = 40  # of one process, to say anything about its growth: imports are no growth
GROWTH_MIB, GROWTH = 32.0, 0.15  # of memory between the second and the last quarter of its life
GROWTH_FILES = 64


class Books(NamedTuple):
    """A history by kind of line."""

    expected: dict[int, dict[str, Any]]  # by template: the normal form of the answer
    asked: list[Asked]
    faults: list[Fault]
    samples: list[Sample]
    ended: list[Ended]

    @classmethod
    def of(cls, lines: Iterable[Line]) -> "Books":
        books = cls({}, [], [], [], [])
        for line in lines:
            if isinstance(line, Expected):
                books.expected[line.template] = whole(line.answer)
            elif isinstance(line, Asked):
                books.asked.append(line)
            elif isinstance(line, Fault):
                books.faults.append(line)
            elif isinstance(line, Sample):
                books.samples.append(line)
            else:
                books.ended.append(line)
        return books


def violations(books: Books) -> list[str]:
    """Everything that should not have happened, one sentence each; empty when all is well."""
    found: list[str] = []
    faults = settled(books.faults)
    for asked in books.asked:
        problem = _problem(asked, books.expected, faults)
        if problem:
            found.append(f"request {asked.number} ({asked.outcome}, {asked.status}): {problem}")
    numbers = [asked.number for asked in books.asked]
    if sorted(numbers) != list(range(len(numbers))):
        found.append("the requests are not numbered one by one: some have no terminal answer")
    for fault in books.faults:
        if fault.problem:
            found.append(f"fault {fault.number} ({fault.kind}): {fault.problem}")
    if books.faults and books.faults[-1].healed is None:
        found.append(f"no token after the last fault ({books.faults[-1].kind})")
    return found + _growth(books.samples) + _end(books.ended)


def _end(ended: list[Ended]) -> list[str]:
    if len(ended) != 1:
        return [f"the history has {len(ended)} ends: the run was cut off"]
    found = []
    if ended[0].crashed:
        found.append(f"the run ended early: {ended[0].crashed}")
    if ended[0].exit_code != 0:
        found.append(f"the launcher ended with exit code {ended[0].exit_code}")
    if ended[0].left_behind:
        found.append(f"left behind: {'; '.join(ended[0].left_behind)}")
    return found


def _problem(asked: Asked, expected: dict[int, dict[str, Any]], faults: list[Fault]) -> str:
    """What is wrong with one request's history, or nothing."""
    if asked.outcome == "refused":
        return _refusal(asked, faults)
    if asked.outcome == "unreachable":
        excused = cause(asked, faults)
        return "" if excused else f"no answer, though somebody listened: {asked.error}"
    if asked.outcome == "broken" and not cause(asked, faults):
        return f"the connection broke: {asked.error}"
    if asked.outcome in ("complete", "left", "broken"):
        want = expected[asked.template]
        return _difference(asked, want, partly=asked.outcome != "complete")
    last = asked.chunks[-1].data[:300] if asked.chunks else asked.error
    return f"no proper end: {last}"


def cause(asked: Asked, faults: list[Fault]) -> str:
    """Why it was not answered, by `settled` faults: the code of a refusal; the kind of the fault
    that broke its connection, or left nobody to listen. Nothing when no fault can have done that.
    """
    if asked.outcome == "refused":
        return _code(asked)
    if asked.outcome not in ("broken", "unreachable"):
        return ""
    broken = _broken_by(asked, faults)
    if asked.outcome == "unreachable":
        return _sent_during(asked, faults) or broken
    return broken


def _code(asked: Asked) -> str:
    """Of a refusal; nothing when it has none."""
    try:
        return str(json.loads(asked.chunks[0].data)["error"]["code"])
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _sent_during(asked: Asked, faults: list[Fault]) -> str:
    """The kind of the fault that left nobody to listen when it was sent, if there was one."""
    return next(
        (f.kind for f in faults if f.kind in ABSENT and f.at - RACE_S <= asked.sent <= _healed(f)),
        "",
    )


def _broken_by(asked: Asked, faults: list[Fault]) -> str:
    """The kind of the fault that killed the process which held its connection, if there was one."""
    return next((f.kind for f in _meanwhile(asked, faults) if f.kind in BREAKING), "")


def _meanwhile(asked: Asked, faults: list[Fault]) -> list[Fault]:
    """The faults that were at work before it ended, and not yet recovered from when it was sent."""
    return [f for f in faults if asked.sent <= _healed(f) and asked.ended >= f.at - RACE_S]


def _patience_s(asked: Asked, meanwhile: list[Fault], *, is_held: bool) -> float:
    """The longest that this request may wait to be refused."""
    unread_s = sum(
        max(0.0, min(asked.ended, _healed(f)) - max(asked.sent, f.at))
        for f in meanwhile
        if f.kind in UNREAD
    )
    return REFUSED_S + unread_s + (HELD_S if is_held else 0.0)


def settled(faults: Iterable[Fault]) -> list[Fault]:
    """The same, each healed when the cluster had recovered from it: from one that was not waited
    for, when it had from a later one."""
    found, healed = list[Fault](), None
    for fault in sorted(faults, key=lambda fault: -fault.number):
        if fault.healed is not None:
            healed = fault.healed if healed is None else min(healed, fault.healed)
        found.append(msgspec.structs.replace(fault, healed=healed))
    return found[::-1]


def _healed(fault: Fault) -> float:
    return float("inf") if fault.healed is None else fault.healed


def _refusal(asked: Asked, faults: list[Fault]) -> str:
    if not (asked.retry_after or "").isdigit():
        return f"Retry-After is {asked.retry_after!r}"
    code = _code(asked)
    if asked.status == 503 and code not in CODES_503:
        return f"code {code!r}"
    meanwhile = _meanwhile(asked, faults)
    # By a reload, perhaps, and then nobody had accepted it.
    is_held = any(fault.kind == "reload" for fault in meanwhile)
    if code == "draining" and not (is_held or _sent_during(asked, faults)):
        return "it was accepted, and then refused since the server drained"
    if asked.ended - asked.sent > _patience_s(asked, meanwhile, is_held=is_held):
        return f"it was accepted, and then dropped ({code}) after {asked.ended - asked.sent:.1f} s"
    if faults and (asked.status == 429 or code == "overloaded"):
        return f"there was room for it ({asked.status}, {code})"
    is_absent = any(fault.kind in ABSENT for fault in meanwhile)
    if code == "starting" and not (is_absent or is_held):
        return "it was refused, though its front end was there all the time"
    return ""


def _difference(asked: Asked, want: dict[str, Any], *, partly: bool) -> str:
    """How the answer differs from the oracle's. `partly`: it may end anywhere."""
    try:
        if asked.stream:
            got = merged(chunk.data for chunk in asked.chunks)
        elif asked.chunks:
            got = whole(json.loads(asked.chunks[0].data))
        else:
            return ""  # broken before its only piece
    except (Disorder, ValueError, KeyError) as error:
        return f"no client can read this: {error!r}"
    if partly:
        return _prefix_difference(got["choices"], want["choices"])
    for part in ("choices", "usage", "system_fingerprint"):
        if got[part] != want[part]:
            return f"{part} differ: {_excerpt(got[part], want[part])}"
    return ""


def _prefix_difference(got: dict[int, Any], want: dict[int, Any]) -> str:
    for index, choice in got.items():
        for part in ("text", "token_ids"):
            if want[index][part][: len(choice[part])] != choice[part]:
                return f"{part} of choice {index}: {_excerpt(choice[part], want[index][part])}"
    return ""


def _excerpt(got: Any, want: Any) -> str:
    if isinstance(got, dict) and isinstance(want, dict) and got.keys() == want.keys():
        for key, value in got.items():
            if value != want[key]:
                return f"{key}: {_excerpt(value, want[key])}"
    return f"{str(got)[:200]!r} instead of {str(want)[:200]!r}"


def _growth(samples: list[Sample]) -> list[str]:
    """Processes whose memory or open files grow all their life."""
    by_process: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_process[sample.role, sample.pid].append(sample)
    found = []
    for (role, pid), ones in by_process.items():
        if len(ones) < MIN_SAMPLES:
            continue
        quarter = len(ones) // 4
        early, late = ones[quarter : 2 * quarter], ones[-quarter:]
        before, after = median(s.rss_mib for s in early), median(s.rss_mib for s in late)
        if after - before > max(GROWTH_MIB, GROWTH * before):
            found.append(f"{role} (pid {pid}) grew from {before:.0f} to {after:.0f} MiB")
        files_before, files_after = median(s.files for s in early), median(s.files for s in late)
        if files_after - files_before > GROWTH_FILES:
            found.append(f"{role} (pid {pid}): {files_before} and then {files_after} open files")
    return found
