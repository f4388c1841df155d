"""The Triton kernels compile for the GPUs that matter, none of which need be here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


CASES = [
    (75, "float16", 64),  # T4
    (80, "bfloat16", 64),
    (90, "bfloat16", 64),  # H100, H200
    (80, "float32", 64),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: this one may have Triton as an interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", *(str(x) for case in CASES for x in case)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compile_and_fit(
    case: tuple[int, str, int], compiled: list[dict[str, Any]]
) -> None:
    capability, dtype, _ = case
    rows = [r for r in compiled if (r["capability"], r["dtype"], r["head_size"]) == case]
    assert len(rows) == 8
    for row in rows:
        assert row["shared"] <= SHARED[capability], row
        assert row["spilled"] <= 64, row
        kind, tile = row["kernel"].split()[:2] if " " in row["kernel"] else (row["kernel"], "")
        has_products = kind == "attend" and tile != "1"
        is_fast = capability >= 80 and dtype != "float32"
        assert bool(row["tensor_cores"]) == (has_products and is_fast), row
