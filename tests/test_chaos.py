"""The chaos command: its checker finds what is wrong, and a short run through real processes."""

import json
import random
import subprocess
import sys

import msgspec
import pytest

from nanogpt.chaos import load, processes, report
from nanogpt.chaos.__main__ import parse
from nanogpt.chaos.check import Books, violations
from nanogpt.chaos.faults import FAULTS
from nanogpt.chaos.history import Asked, Chunk, Ended, Expected, Fault, History, Sample, read
from tests.server import ROOT
from tests.test_e2e import wait_until

IDS = list(range(10, 22))
TEXT = "abcdefghijkl"


def choice(text: str, ids: list[int], finish_reason: str | None) -> dict:
    return {"index": 0, "text": text, "token_ids": ids, "finish_reason": finish_reason}


def usage(cached: int = 0) -> dict:
    counts = {"prompt_tokens": 3, "completion_tokens": len(IDS), "total_tokens": 3 + len(IDS)}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


ANSWER = {
    "id": "cmpl-1",
    "system_fingerprint": "fp",
    "choices": [choice(TEXT, IDS, "length")],
    "usage": usage(),
}
EXPECTED = Expected(template=0, body={}, answer=ANSWER)
END = Ended(at=99.0, exit_code=0)


def whole_answer(**changes) -> Asked:
    body = json.dumps({**ANSWER, "usage": usage(cached=2)})
    given = {"number": 0, "template": 0, "stream": False, "behaviour": "reads", "sent": 1.0}
    given |= {"ended": 2.0, "outcome": "complete", "status": 200, "chunks": [Chunk(2.0, body)]}
    return Asked(**{**given, **changes})


def events(pieces: list[tuple[str, list[int], str | None]]) -> list[Chunk]:
    head = {"id": "cmpl-1", "system_fingerprint": "fp", "usage": None}
    chunks = [{**head, "choices": [choice(*piece)]} for piece in pieces]
    chunks.append({**head, "choices": [], "usage": usage()})
    return [Chunk(1.0 + 0.1 * i, json.dumps(chunk)) for i, chunk in enumerate(chunks)]


PIECES = [(TEXT[i], [IDS[i]], "length" if i == 11 else None) for i in range(12)]


def streamed_answer(pieces=PIECES, **changes) -> Asked:
    return whole_answer(**{"stream": True, "chunks": events(list(pieces)), **changes})


def refusal(status=503, code="overloaded", **changes) -> Asked:
    body = json.dumps({"error": {"message": "", "type": "", "param": None, "code": code}})
    given = {"status": status, "retry_after": "1", "outcome": "refused"}
    return whole_answer(**{**given, "chunks": [Chunk(2.0, body)], **changes})


def fault(kind: str, at=1.5, healed: float | None = 3.0, number=0, **changes) -> Fault:
    return Fault(number=number, kind=kind, at=at, healed=healed, **changes)


def found(*lines, end: Ended | None = END) -> list[str]:
    return violations(Books.of([EXPECTED, *lines, *([end] if end else [])]))


def test_a_history_without_violations():
    assert found(whole_answer()) == []
    assert found(streamed_answer()) == []
    assert found(refusal()) == []
    assert found(streamed_answer(PIECES[:5], outcome="left")) == []
    unanswered = {"outcome": "unreachable", "status": 0, "chunks": []}
    assert found(whole_answer(**unanswered), fault("drain", at=0.5)) == []
    broken = streamed_answer(PIECES[:5], outcome="broken")
    assert found(broken, fault("kill-worker")) == []


def reordered() -> list:
    return [PIECES[1], PIECES[0], *PIECES[2:]]


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (streamed_answer(PIECES[:4] + PIECES[5:]), "choices differ"),
        (streamed_answer(PIECES[:4] + PIECES[3:]), "choices differ"),
        (streamed_answer(reordered()), "choices differ"),
        (streamed_answer(PIECES[:-1]), "choices differ"),
        (streamed_answer([*PIECES, ("x", [1], None)]), "after its end"),
        (streamed_answer(reordered()[:5], outcome="left"), "text of choice 0"),
        (streamed_answer(PIECES[:5], outcome="broken"), "connection broke"),
        (whole_answer(chunks=[Chunk(2.0, json.dumps({**ANSWER, "usage": {}}))]), "usage"),
        (whole_answer(chunks=[Chunk(2.0, "<html>")]), "no client can read"),
        (whole_answer(outcome="failed", status=500), "no proper end"),
        (whole_answer(outcome="timeout", chunks=[], error="nothing"), "no proper end: nothing"),
        (whole_answer(outcome="unreachable", status=0, chunks=[]), "somebody listened"),
        (refusal(retry_after=None), "Retry-After"),
        (refusal(code="tired"), "tired"),
        (refusal(chunks=[Chunk(2.0, "<html>")]), "code ''"),
        (refusal(code="draining"), "accepted, and then refused"),
        (refusal(ended=7.0), "accepted, and then dropped (overloaded) after 6.0 s"),
        (refusal(code="starting", ended=7.0), "accepted, and then dropped (starting)"),
        (refusal(429, "rate_limit_exceeded", ended=7.0), "accepted, and then dropped"),
        (whole_answer(number=1), "numbered"),
    ],
)
def test_each_violation_is_found(asked, word):
    assert word in " ".join(found(asked))


def test_a_fault_excuses_only_what_it_can_cause():
    """A killed rank breaks no connection, and a drain breaks none that was accepted before."""
    broken = streamed_answer(PIECES[:5], outcome="broken")
    assert found(broken, fault("kill-rank"))
    assert found(broken, fault("drain"))
    assert found(broken, fault("kill-worker", at=7.0))
    wrong = streamed_answer(reordered()[:5], outcome="broken")
    assert found(wrong, fault("kill-worker"))
    assert "room for it" in found(refusal(), fault("kill-rank"))[0]
    assert "room for it" in found(refusal(429, "rate_limit_exceeded"), fault("drain"))[0]
    assert "all the time" in found(refusal(code="starting"), fault("kill-rank"))[0]
    assert found(refusal(code="starting"), fault("kill-master")) == []
    refused = refusal(code="draining", sent=1.0)
    assert found(refused, fault("drain", at=2.5))
    assert found(refused, fault("drain", at=1.2)) == []


def test_a_late_refusal_is_excused_by_the_time_in_which_nobody_could_read():
    late = refusal(code="starting", sent=1.0, ended=18.0)
    assert found(late, fault("kill-master", at=2.0, healed=15.0)) == []
    assert "dropped" in found(late, fault("kill-master", at=2.0, healed=12.0))[0]
    assert "dropped" in found(late, fault("kill-rank", at=2.0, healed=15.0))[0]
    assert "dropped" in found(late, fault("drain", at=0.5, healed=15.0))[0]
    held = refusal(code="draining", sent=1.0, ended=30.0)
    drain = fault("drain", at=2.5, healed=40.0, number=1)
    assert found(held, fault("reload", at=0.5, healed=None), drain) == []
    assert found(held, fault("kill-rank", at=0.5, healed=None), drain)


def test_a_fault_that_was_not_waited_for_excuses_until_the_next_that_was():
    hurried = fault("kill-worker", healed=None)
    later = fault("kill-rank", at=1.7, healed=3.0, number=1)
    broken = {"outcome": "broken", "ended": 6.0}
    assert found(streamed_answer(PIECES[:5], **broken), hurried, later) == []
    assert found(streamed_answer(PIECES[:5], sent=4.0, **broken), hurried, later)


def test_a_round_has_each_kind_as_often_as_it_is_asked_for():
    kinds = parse(["--faults", "kill-rank=3, drain,kill-all=0"]).faults
    assert kinds == ("kill-rank", "kill-rank", "kill-rank", "drain")
    for wrong in ("", "no-such", "drain=often", "drain=0"):
        with pytest.raises(SystemExit):
            parse(["--faults", wrong])


def test_what_the_run_itself_saw_is_reported():
    assert "exit code 3" in found(fault("drain", problem="exit code 3"))[0]
    assert "no token after" in found(fault("kill-rank", healed=None))[0]
    assert "exit code 1" in found(end=Ended(at=1.0, exit_code=1))[0]
    assert "left behind" in found(end=Ended(at=1.0, exit_code=0, left_behind=["7 python"]))[0]
    assert "ended early" in found(end=Ended(at=1.0, exit_code=0, crashed="why"))[0]
    assert "cut off" in found(end=None)[0]


def samples(rss, files=50) -> list[Sample]:
    return [
        Sample(at=float(i), role="worker", pid=7, rss_mib=rss(i), files=files) for i in range(40)
    ]


def test_growth_is_found_and_a_start_is_not():
    assert found(*samples(lambda i: 100.0 + 5 * i))
    assert not found(*samples(lambda i: 100.0 if i < 5 else 300.0))
    slow = [10, 80, 140, 173, 192, 204, 214] + [225] * 33  # a torch that is imported
    assert not found(*samples(lambda i: slow[i])[: len(slow)])


def test_histories_round_trip(tmp_path):
    history = History(tmp_path / "h.jsonl")
    lines = [EXPECTED, streamed_answer(), fault("drain"), *samples(float)[:1], END]
    for line in lines:
        history.add(line)
    history.close()
    assert list(read(history.path)) == lines
    with history.path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(msgspec.ValidationError):
        list(read(history.path))


def test_figures():
    silent = events(PIECES)
    late = [Chunk(c.at + (2.0 if c.at > 1.5 else 0.0), c.data) for c in silent]
    asked = streamed_answer(chunks=late, ended=9.0)
    books = Books.of([EXPECTED, asked, fault("kill-rank", loading_s=0.5), END])
    row = report.figures(books)["by_fault"]["kill-rank"]
    assert row["pause_s"]["max"] == pytest.approx(2.1, abs=0.01)
    assert row["recovery_s"]["p50"] == 1.5
    assert row["beyond_loading_s"]["p50"] == 1.0
    assert "kill-rank" in report.table(report.figures(books))


def test_outcomes_are_counted_with_their_reasons():
    """ "0 lost" says little without how many were answered."""
    gone = {"outcome": "unreachable", "status": 0, "chunks": []}
    asked = [
        whole_answer(),
        streamed_answer(PIECES[:5], outcome="left"),
        refusal(code="starting"),
        refusal(429, "rate_limit_exceeded"),
        streamed_answer(PIECES[:5], outcome="broken"),
        whole_answer(sent=5.0, ended=5.0, **gone),
        whole_answer(sent=40.0, ended=40.0, **gone),
    ]
    faults = [fault("kill-worker"), fault("drain", at=4.5, healed=6.0, number=1)]
    result = report.figures(Books.of([EXPECTED, *asked, *faults, END]))
    assert result["outcomes"] == {
        "broken: kill-worker": 1,
        "complete": 1,
        "left": 1,
        "refused: rate_limit_exceeded": 1,
        "refused: starting": 1,
        "unreachable": 1,
        "unreachable: drain": 1,
    }
    shown = report.table(result)
    assert "7 requests, of them" in shown
    assert "      1 refused: starting" in shown


def test_the_load_is_a_function_of_its_seed():
    bodies = [load.make_body(random.Random(f"{i}")) for i in range(300)]
    assert bodies == [load.make_body(random.Random(f"{i}")) for i in range(300)]
    for field in ("stop", "logprobs", "echo", "best_of", "top_p"):
        assert any(field in body for body in bodies)
    assert {type(body["prompt"]) for body in bodies} == {str, list}


def test_a_short_run_loses_nothing(tmp_path):
    """Every kind of fault once, with real processes. With this seed the front end is stopped for
    four seconds: past the watchdog's patience, but no longer than need be."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nanogpt.chaos", "--duration", "240"),
            *("--faults", ",".join(FAULTS), "--kills", str(len(FAULTS))),
            *(
                "--seed",
                "259",
                "--templates",
                "10",
                "--requests-in-flight",
                "6",
                "--directory",
                str(tmp_path),
            ),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["violations"] == 0
    assert set(result["by_fault"]) == set(FAULTS)
    assert result["outcomes"]["complete"] > 10


def test_a_run_that_is_killed_takes_its_cluster_with_it(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "nanogpt.chaos", "idle", "--directory", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    mark = f"NANOGPT_RUN_DIR={tmp_path / 'run'}"
    wait_until(lambda: len(processes.holding(mark)) >= 3, 60)
    run.kill()
    run.wait()
    wait_until(lambda: not processes.holding(mark), 60)
