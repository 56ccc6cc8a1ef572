"""tests/mutants.py finds what to take away from the kernels, and a few of its mutants are caught here and now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants


def test_every_barrier_and_wait_has_a_mutant() -> None:
    for file in mutants.SOURCES:
        text = (mutants.ROOT / "kernels/cuda" / file).read_text()
        found = [mutant.kind for mutant in mutants.mutants_of(file)]
        for kind, call in (("barrier", "barrier();"), ("wait", "copy_wait<"), ("commit", "copy_commit();")):
            calls = [line for line in text.splitlines() if call in line.split("//")[0]]
            assert found.count(kind) == len(calls), f"{file}: {kind}"


@pytest.mark.parametrize("choice", [("--file", "gelu.cuh", "--kind", "barrier"), ("--kind", "wait", "--sample", "1")])
def test_a_few_are_caught(choice: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.mutants", *choice]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 survived" in result.stdout
