"""dev/FAILURES.md: every row names a test that is there."""

import re
import subprocess
import sys

from tests.server import ROOT


def rows() -> list[list[str]]:
    lines = (ROOT / "dev" / "FAILURES.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return [row for row in cells if row[0] not in ("fault", "---")]


def test_every_row_of_the_failure_matrix_has_its_test():
    named = set()
    for row in rows():
        assert len(row) == 5, row
        found = re.fullmatch(r"`(test_\w+\.py::.+)`", row[-1].strip(" |"))
        assert found, row
        named.add(f"tests/{found[1]}")
    assert len(named) > 20
    files = sorted({name.partition("::")[0] for name in named})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    collected = set(done.stdout.splitlines())
    assert collected, done.stderr
    assert not named - collected
