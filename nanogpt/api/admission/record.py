"""Every decision goes through here: counted for the metrics, and written to the audit log."""

import threading
from collections import Counter

import msgspec

from nanogpt.api.admission.audit import AuditLog, Entry
from nanogpt.api.admission.clock import Clock
from nanogpt.api.admission.state import Action


class Recorder:
    """Thread-safe."""

    def __init__(self, audit: AuditLog | None, clock: Clock) -> None:
        self.audit, self._clock = audit, clock
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def note(self, entry: Entry) -> None:
        """`entry` without its time."""
        decision = f"dry_run_{entry.decision}" if entry.dry_run else entry.decision
        with self._lock:
            self._counts[decision, entry.code or entry.rule] += 1
        if self.audit is not None:
            self.audit.write(msgspec.structs.replace(entry, time=round(self._clock.time(), 3)))

    def note_action(self, action: Action, request_id: str) -> None:
        """What a rule did."""
        self.note(
            Entry(
                decision=action.kind,
                request_id=request_id,
                key=action.key,
                user=action.user,
                rule=action.rule,
                reason=action.reason,
                dry_run=action.dry_run,
            )
        )

    def counts(self) -> dict[tuple[str, str], int]:
        """How often, by decision ("dry_run_…": only reported) and error code (or rule)."""
        with self._lock:
            return dict(self._counts)
