"""What the admission tests share: a clock that stands still, and an Admission in a directory."""

import json
from pathlib import Path
from typing import Any

from nanogpt.api.admission import Admission, AdmissionConfig, Principal, Ticket
from nanogpt.config import convert

# Backtracks without end on a run of "a" that something else follows.
CATASTROPHE = r"(a|aa)+$"
PREY = "a" * 5000 + "b"


class FakeClock:
    """Both clocks of `time`; they move when a test says so."""

    def __init__(self, now: float = 1_700_000_000.25) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_config(directory: Path, **table: Any) -> AdmissionConfig:
    return convert({"state": str(directory / "state.sqlite"), **table}, AdmissionConfig)


class Client:
    """One client of an Admission, with the HTTP layer's order of calls."""

    def __init__(self, admission: Admission, authorization: str | None = None) -> None:
        self.admission, self.authorization = admission, authorization

    @property
    def principal(self) -> Principal:
        return self.admission.authenticate(self.authorization, request_id="req_1")

    def ask(
        self,
        user: str | None = "alice",
        prompt: str = "once upon a time",
        tokens: tuple[int, int] = (4, 16),
        request_id: str = "req_1",
        model: str = "gpt2",
    ) -> Ticket:
        principal = self.admission.authenticate(self.authorization, request_id=request_id)
        who: dict[str, Any] = {"user": user, "request_id": request_id, "model": model}
        self.admission.precheck(principal, **who)
        return self.admission.admit(
            principal,
            **who,
            prompts=[prompt],
            prompt_tokens=tokens[0],
            max_new_tokens=tokens[1],
        )


def audit_lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]
