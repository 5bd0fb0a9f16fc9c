"""recipes/faults.md names tests that exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "recipes" / "faults.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", TABLE, re.MULTILINE)
ROWS = [row for row in ROWS if row[0] != "fault"]


@functools.cache
def names_in(name):
    (file,) = TESTS.rglob(name)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_read():
    assert len(ROWS) > 65


@pytest.mark.parametrize(("fault", "behaviour", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_every_fault_has_a_test_or_a_reason_why_not(fault, behaviour, test):
    named = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", test)
    if named is None:
        assert test.startswith("not tested")
        return
    assert named[2] in names_in(named[1])
