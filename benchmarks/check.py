"""Checks whether anything became slower: compares the ratios, not the seconds, of a new run with the committed ones.

    python -m benchmarks.check out/benchmarks/results.json [benchmarks/results/results.json]

By default, compares with the committed results of the same instruction set and number of threads. A ratio may fall by
15 % plus the spread of both runs (half of the distance between the quartiles). Exits with 1 and lists the rows if any
fell by more. Raises ValueError for another instruction set or number of threads, since ratios are not comparable then,
and for runs without a common row.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import COMMITTED, Results, elsewhere, load

ALLOWED = 0.15
KIND = "isa", "threads"  # of machine


def half_spread(ratio: list[float]) -> float:
    """Return half of the distance between the quartiles, relative to the median."""
    median, low, high = ratio
    return (high - low) / 2 / median


def regressions(new: Results, old: Results) -> list[str]:
    """Return a line for each row whose ratio fell by more than allowed."""
    for key in KIND:
        if new[key] != old[key]:
            raise ValueError(f"{key} was {old[key]} and is {new[key]}: these ratios cannot be compared")

    def by_name(results: Results) -> dict[tuple[str, ...], dict[str, Any]]:
        return {(row["group"], row["case"], row["against"]): row for row in results["rows"]}

    before, after = by_name(old), by_name(new)
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(f"none of {len(after)} rows is among the {len(before)} committed ones")
    lines = []
    for name in common:
        was, now = before[name]["ratio"], after[name]["ratio"]
        fallen, allowed = 1 - now[0] / was[0], ALLOWED + half_spread(was) + half_spread(now)
        if fallen > allowed:
            lines.append(
                f"{', '.join(name)}: {was[0]:.2f} x -> {now[0]:.2f} x, {fallen:.0%} less ({allowed:.0%} allowed)"
            )
    return lines


def like(new: Results, folder: Path) -> Results:
    """Return the results in or below this folder that `new` can be compared with, else the folder's own."""
    known = [load(path) for path in (folder / "results.json", *elsewhere(folder))]
    return next((old for old in known if all(old[key] == new[key] for key in KIND)), known[0])


def main(new: Path, old: Path | None = None) -> int:
    measured = load(new)
    results = measured, like(measured, COMMITTED) if old is None else load(old)
    lines = regressions(*results)
    print(
        *lines or [f"no ratio has fallen ({len(results[0]['rows'])} rows against {len(results[1]['rows'])})"], sep="\n"
    )
    return 1 if lines else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
