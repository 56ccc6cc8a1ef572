"""tools/mutants.py finds what to take away from the kernels, and a few of its mutants are caught here and now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import mutants

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("barrier", "barrier();"),
        ("wait", "copy_wait<"),
        ("wait", "wgmma_wait<"),
        ("commit", "copy_commit();"),
        ("commit", "wgmma_commit();"),
        ("fence", "wgmma_fence();"),
        ("fence", "fence_proxy_async();"),
        ("mask", "mask_scores(acc_s,"),
        ("mask", "mask_scores(dp,"),
        ("mask", " fill_chunk("),
        ("check", "if (!to)"),
        ("check", "nullptr; }"),
        ("swizzle", "^ swizzle"),
    ],
)
def test_every_such_line_has_a_mutant(kind: str, call: str) -> None:
    for file in mutants.SOURCES:
        found = {mutant.line for mutant in mutants.mutants_of(file) if mutant.kind == kind}
        lines = enumerate(mutants.lines_of(file), 1)
        assert found >= {at for at, line in lines if call in line.split("//")[0] and "GPTCORE_DEVICE void" not in line}


def test_the_table_is_of_these_kernels_and_nothing_survives_without_a_reason() -> None:
    rows = [line for line in mutants.TABLE.read_text().splitlines() if line.startswith("|")][2:]
    now = [mutant for file in mutants.SOURCES for mutant in mutants.mutants_of(file)]
    for row, mutant in zip(rows, now, strict=True):
        begin = mutants.row(mutant, "").removesuffix(" |")
        assert row.startswith(begin), f"run python -m tools.mutants: not in its table: {mutant}"
        assert "SURVIVES" not in row
        assert ("survives: " in row) == (mutant.key in mutants.HARMLESS), f"{mutant} is noticed, so it is not harmless"
    assert {mutant.key for mutant in now} >= mutants.HARMLESS.keys()


@pytest.mark.parametrize("choice", [("--file", "gelu.cuh", "--kind", "barrier"), ("--kind", "wait", "--sample", "1")])
def test_a_few_are_caught(choice: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tools.mutants", *choice]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 survived" in result.stdout
