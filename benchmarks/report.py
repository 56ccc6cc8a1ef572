"""Writes tables, charts and the README's part about speed from results.json.

    python -m benchmarks.report [DIR]     default: benchmarks/results, whose results the README shows

Draws the charts beside DIR/results.json and writes DIR/README.md with every row; for benchmarks/results also the text
between the markers of the project's README.md. None of that text is edited by hand. A file DIR/also-NAME.json has the
results of some benchmarks that were run apart; its rows follow those of results.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.charts import draw
from benchmarks.readme import readme
from benchmarks.tables import (
    COMMITTED,
    ROOT,
    Results,
    caption,
    elsewhere,
    load,
    machine,
    markdown,
    quantity,
    shortfalls,
    table,
)
from gptcore.files import atomic_file, read_json, write_json

WHY = """Why goals are missed, and which rows measure the cause:

- "The whole of a limit would be ...": the limit itself bounds the ratio. PyTorch is close to it, or the goal nearly
  equals it. Other lines state the ratio without a cost that the following rows measure.
- Attention in bfloat16: all work except the matrix products, which matters most if AMX computes these. *Attention
  without its matmuls* measures it with the same scores and a head_dim of 2; matmuls that thin are slow, so it is an
  upper bound. *Attention against its matmuls* has no mask. At S=256, blocks on the diagonal are partly masked but
  fully computed.
- Decoding at batch 1: the call from Python, which *attention decode, native function alone* excludes.
- GELU and layer norm: page faults on new memory, and the call. *GELU into preallocated outputs*, *layer norm into
  preallocated outputs* and *malloc keeps freed memory* run the same kernels without page faults, or without both. With
  few rows (128, 512) the data stays in the cache, and the arithmetic takes most of the time.
- Training steps: *step with parts removed* removes one part after the other; each row also lacks the parts of the
  rows above it. The last row is the step without steps of transformers in between, after which memory must be mapped
  again. Half of the small model's step in bfloat16 is *its matmuls alone*; *linear layer* measures their rate.
  *Overhead of a small model's step* is the time of Python and PyTorch around the kernels, *call overhead of ...* that
  of one call."""


def full(results: Results) -> str:
    """Return all of results.json, as the README of its folder."""
    charts = "![attention](attention.png)\n\n![roofline](roofline.png)"
    text = (
        "The ratio is the time, or memory, of the reference divided by ours; above 1, ours is better. Quartiles are in "
        "parentheses, or the extremes if there are fewer than eight rounds. Percentages are of a limit measured in "
        "the same rounds: the rate of one large matrix product or copy in PyTorch. A kernel can exceed 100 % with data "
        "that stays in the cache, or if its products run faster than the large one in PyTorch."
    )
    listed = "\n".join(f"- {line}" for line in shortfalls(results))
    parts = ["# Results", f"{caption(results)}.", text, listed, WHY, markdown(table(results)), charts]
    return "\n\n".join(parts) + "\n"


def on_other_machines(folder: Path) -> str:
    lines = [
        f"- {machine(results)}: [{path.parent.name}]({path.parent.name}/README.md), {shortfalls(results)[0]}"
        for path in elsewhere(folder)
        for results in [load(path)]
    ]
    note = "The goals were set for the machine of this page.\n\n"
    return "\n## On other machines\n\n" + note + "\n".join(lines) + "\n" if lines else ""


def of_other_runs(folder: Path) -> str:
    parts = [(path.stem.removeprefix("also-"), load(path)) for path in sorted(folder.glob("also-*.json"))]
    return "".join(
        f"\n## Run apart: {name}\n\n{caption(results)}, load {results['load']}.\n\n{markdown(table(results))}\n"
        for name, results in parts
    )


def on_a_gpu(folder: Path) -> str:
    """Return the table of gpu.json, if python -m benchmarks.gpu wrote one here: a line for each case and pass."""
    if not (folder / "gpu.json").exists():
        return ""
    found = read_json(folder / "gpu.json")
    rates, rows = found["rates"], found["rows"]
    columns = list(dict.fromkeys(row["name"] for row in rows))
    lines = [["operation", "case", "pass", "of the limit", *columns]]
    for key, group in groupby(rows, key=lambda row: (row["op"], row["case"])):
        cases = list(group)
        for stage in ("forward", "backward"):
            here = {row["name"]: row for row in cases if row["pass"] == stage}
            best = max(row["percent"] or 0.0 for name, row in here.items() if name.startswith("gptcore"))
            limit = f"{best:.0f} % of {'matmul' if key[0] == 'attention' else 'copy'}"
            cells = (here.get(column, {}).get("ms") for column in columns)
            lines.append([*key, stage, limit, *("" if ms is None else f"{ms:.3f} ms" for ms in cells)])
    head = (
        f"{found['gpu']}, PyTorch {found['torch']}, {found['date']}; copy {quantity(rates['copy'], 'B/s')}, matmul "
        f"bfloat16 {quantity(rates['matmul'], 'FLOP/s')}. Medians of CUDA events, with an empty L2 cache. The "
        "percentage is that of the faster gptcore backend. SDPA flash is FlashAttention-2."
    )
    return f"\n## On a GPU\n\n{head}\n\n{markdown(lines)}\n\n![on a GPU](gpu.png)\n"


def present(results: Results, folder: Path) -> None:
    """Write results.json and the charts, and print the table and what is missed of the goals."""
    write_json(folder / "results.json", results)
    draw(results, folder)
    console = Console(width=None if Console().is_terminal else 160)
    heading, *lines = table(results)
    shown = Table(*heading, title=caption(results))
    for line in lines:
        shown.add_row(*line)
    console.print(shown, *shortfalls(results), sep="\n", markup=False, highlight=False)
    console.print(f"wrote results.json and charts to {folder}", markup=False, highlight=False)
    if results["load"] > 0.5 and not results["form"].startswith("toy"):
        console.print(f"the machine was busy when this began (load {results['load']}): do not keep these results")


def write(path: Path, make: Callable[[], str]) -> None:
    text = make()
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def main(folder: Path = COMMITTED) -> None:
    results = load(folder / "results.json")
    draw(results, folder)
    write(
        folder / "README.md",
        lambda: full(results) + of_other_runs(folder) + on_other_machines(folder) + on_a_gpu(folder),
    )
    if folder.resolve() == COMMITTED:
        page = ROOT / "README.md"
        write(page, lambda: readme(page.read_text(encoding="utf-8"), results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
