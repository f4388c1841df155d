"""dev/CONTRACT.md names a test for each promise: they must exist, and each promise have one."""

import ast
import functools
import re

import pytest

from nanogpt.config import PROJECT

TABLE = (PROJECT / "dev" / "CONTRACT.md").read_text()
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| promise"))
]


@functools.cache
def defined_in(file: str) -> set[str]:
    """Functions, and methods as Class::method."""
    found = set()
    for node in ast.parse((PROJECT / "tests" / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {f"{node.name}::{method.name}" for method in methods}
    return found


NAMED = re.compile(r"`(test_\w+\.py)::((?:Test\w+::)?test_\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_promise_has_tests(row):
    _, tests = row
    named = NAMED.findall(tests)
    assert named
    assert not NAMED.sub("", tests).strip(), "something else"
    for file, name in named:
        assert name in defined_in(file), f"{file} has no {name}"


def test_the_table_is_there():
    assert len(ROWS) > 60
