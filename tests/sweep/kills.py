"""A run of two processes with ten random kills ends as an undisturbed one: pytest tests/sweep/kills.py

Each kill costs the start of two processes, which is too much for every run; so pytest does not collect this file by
default.
"""

from __future__ import annotations

from pathlib import Path

from processes import alone
from test_distributed import check_kills

__all__ = ["alone"]


def test_ten_random_kills(tmp_path: Path, alone: Path) -> None:
    check_kills(tmp_path / "run", alone, kills=10)
