"""tests/mutants.py: its table is that of today's kernels, and a few of its mutants are caught here and now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants

ROWS = [line.split(" | ") for line in mutants.TABLE.read_text().splitlines() if line.startswith("| ")][1:]


def test_the_table_lists_the_mutants_of_these_kernels() -> None:
    listed = [" | ".join(row[:3]) for row in ROWS]
    now = [mutant for file in mutants.SOURCES for mutant in mutants.mutants_of(file)]
    made = [line.rsplit(" | ", 1)[0] for line in mutants.table([(m, "") for m in now]).splitlines() if line[:2] == "| "]
    assert listed == made[1:], "kernels have changed: run python -m tests.mutants"


def test_every_mutant_was_caught_or_is_harmless_for_a_reason() -> None:
    assert len(ROWS) > 100
    assert not [row for row in ROWS if "SURVIVES" in row[-1] or "does not compile" in row[-1]]


@pytest.mark.parametrize("choice", [("--file", "gelu.cuh", "--kind", "barrier"), ("--kind", "wait", "--sample", "1")])
def test_a_few_are_caught(choice: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.mutants", *choice]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 survived" in result.stdout
