"""From results.json to what people read: tables, charts, and the README's part about speed.

    python -m benchmarks.report [DIR]     default: benchmarks/results, whose results the README shows

Draws the charts beside DIR/results.json and writes DIR/README.md with every line of it; and, for benchmarks/results,
the text between the markers of the project's README.md. Nothing of these is typed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # no pyplot: it would choose a display
from rich.console import Console
from rich.table import Table

from benchmarks.goals import Outcome, outcomes
from gptcore.files import atomic_file, read_json, write_json

SCHEMA = 1
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
MARKERS = "<!-- made by python -m benchmarks.report: do not edit -->", "<!-- end of what it made -->"
HEADING = ["operation", "case", "ours", "reference", "ratio", "of the limit", "goal"]

Results = dict[str, Any]


def load(path: Path) -> Results:
    """A results.json. Raises ValueError for one of another schema."""
    results = read_json(path)
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {results.get('schema')}, expected {SCHEMA}: measure again (make bench)")
    return results


def joined(parts: list[Results]) -> Results:
    """The results of several processes as one: all rows, and each limit from where it was measured most often."""
    limits: dict[str, Any] = {}
    for part in parts:
        for name, limit in part["limits"].items():
            if name not in limits or limit["rounds"] > limits[name]["rounds"]:
                limits[name] = limit
    return {**parts[0], "limits": limits, "rows": [row for part in parts for row in part["rows"]]}


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 0.00123 s is 1.23 ms."""
    prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")]
    scale, prefix = next((pair for pair in prefixes if value >= 0.9995 * pair[0]), prefixes[-1])
    digits = value / scale
    return f"{digits:.{0 if digits >= 99.95 else 1 if digits >= 9.995 else 2}f} {prefix}{unit}"


def machine(results: Results) -> str:
    return f"{results['cpu']}, {results['threads']} threads, {results['isa']} kernels"


def caption(results: Results) -> str:
    versions, limits = results["versions"], results["limits"]
    rates = "; ".join(f"{name} {quantity(limit['rate'][0], limit['unit'])}" for name, limit in limits.items())
    return (
        f"{machine(results)}, PyTorch {versions['torch']}, "
        f"transformers {versions['transformers']}, {results['date']}, {results['form']} form"
        + f"; {rates}"
        * bool(rates)
    )


def times(ratio: list[float]) -> str:
    """A ratio with its quartiles, and a word where they are on both sides of 1."""
    median, low, high = ratio
    return f"{median:.2f} x ({low:.2f} to {high:.2f})" + ", no difference beyond the spread" * (low <= 1 <= high)


def table(results: Results) -> list[list[str]]:
    """The heading, then the cells of every row."""
    lines = [HEADING]
    for row in results["rows"]:
        measured = [quantity(row[side][0], row["unit"]) for side in ("ours", "reference")]
        if "tokens" in row["extra"]:
            measured = [f"{row['extra']['tokens'] / row[side][0]:,.0f} tokens/s" for side in ("ours", "reference")]
        limit = (
            "" if row["percent"] is None else "{:.0f} % ({:.0f} to {:.0f}) of {}".format(*row["percent"], row["limit"])
        )
        goals = "; ".join(f"{goal.goal:g} {goal.unit} {goal.verdict}" for goal in outcomes(row))
        measured[1] += f", {row['against']}"
        lines.append([row["group"], row["case"], *measured, times(row["ratio"]), limit, goals])
    return lines


def shortfalls(results: Results) -> list[str]:
    """One line on all goals, and one for each that is missed."""
    found = [(row, goal) for row in results["rows"] for goal in outcomes(row)]
    missed = [
        f"{goal.verdict}: {row['group']}, {row['case']}: {goal.measured.median:.2f} of {goal.goal:g} {goal.unit}"
        + ceiling(row, goal, results["rows"])
        for row, goal in found
        if not goal.met
    ]
    return [f"{len(found) - len(missed)} of {len(found)} goals met", *missed]


def ceiling(row: dict[str, Any], goal: Outcome, rows: list[dict[str, Any]]) -> str:
    """What the whole of the limit would be, or, where that would do, what the rows say that measure what stops it."""
    if row["percent"] is None:
        return ""
    measured, share = goal.measured.median, row["percent"][0] / 100
    whole = f"; the whole of {row['limit']} would be {measured / share:.2f} x" if goal.unit == "x" else ""
    if whole and measured / share < goal.goal:
        return whole
    found = ""
    for other in rows:
        if not goal.stops or not f"{other['group']} {other['case']}".startswith(goal.stops):
            continue
        if "rest of" in other["group"]:  # in units of our time: products as the limit makes them, and ours for the rest
            most = measured / (share + other["ratio"][0])
            found += f"; the whole of {row['limit']} and the rest as it is alone would be {most:.2f} {goal.unit}"
        elif goal.unit == "%":
            found += f"; {other['group']}, {other['case']}: {other['percent'][0]:.0f} %"
        elif "in parts" in other["group"]:
            found += f"; {other['case']}: {measured * other['ratio'][0]:.2f} x"
        else:
            found += f"; {other['group']}: {measured * other['ratio'][0]:.2f} x"
    return found or whole


WHY = """What stops those that are missed, and the rows that measure it:

- Where a line says what the whole of a limit would be, the limit itself is in the way: PyTorch is too near to it, or
  all of it would have to be reached.
- Otherwise it says what would be without what stops it, by rows of this table, and of which the following tell more.
- Attention in bfloat16: what is not products, above all where AMX makes these. *Rest of attention* measures it, by the
  same scores with a head_dim of 2; products that thin are slow, so that it is a bound from above. A line that counts it
  says what products at the whole rate of matmul would be with that after them. *Attention against its products* is
  without a mask. At S=256 the blocks on the diagonal count, of which a part is computed and masked.
- Decoding at batch 1: the call from Python. *Attention decode, native function alone* is without it.
- GELU and layer norm: the first touch of new memory, by the system, and the call. *GELU into memory that exists*,
  *layer norm into memory that exists* and *freed memory kept* are the same kernels without the one, or without both.
  With few rows (128, 512) they stay in the cache: what these take is arithmetic, which counts where memory is fast.
- Training steps: *step in parts* takes away one part after the other, each without those before; *all of it* is the
  step where no step of transformers is made beside it, after which memory has to be found anew. Half of the small
  model's step in bfloat16 is *its matmuls alone*, and *linear layer* says at what rate it has them; *overhead of a
  small model's step* is what Python and PyTorch take for its calls, *call of ...* what they take for one."""


def markdown(lines: list[list[str]]) -> str:
    heading, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *rest])


def between(values: list[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def summary(results: Results, folder: Path = COMMITTED) -> str:
    """What the README shows: one line for each group, the range over its cases, and a link to every figure."""
    lines = [["operation", "against", "times as fast, or as small", "percent of the limit", "goals met"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["group"], row["against"]), []).append(row)
    for (group, against), cases in groups.items():
        percents = [row["percent"][0] for row in cases if row["percent"] is not None]
        limits = {row["limit"] for row in cases if row["percent"] is not None}
        met = [goal.met for row in cases for goal in outcomes(row)]
        lines.append([
            group, against, between([row["ratio"][0] for row in cases], ".2f"),
            f"{between(percents, '.0f')} % of {', '.join(sorted(limits))}" if percents else "",
            f"{sum(met)} of {len(met)}" if met else "",
        ])  # fmt: skip
    return (
        f"Medians of interleaved rounds on {caption(results)}. All cases with their spread, and what is missed of the "
        f"goals: [benchmarks/results](benchmarks/results/README.md)."
        + "".join(
            f" And on {machine(load(path))}: [{path.parent.name}](benchmarks/results/{path.parent.name}/README.md)."
            for path in elsewhere(folder)
        )
        + f"\n\n{markdown(lines)}\n\n"
        "![speed of attention against sequence length](benchmarks/results/attention.png)"
    )


def full(results: Results) -> str:
    """All of results.json, as the README of its folder."""
    charts = "![attention](attention.png)\n\n![roofline](roofline.png)"
    text = (
        "Ratio: time, or memory, of the reference by ours; above 1, ours is better. In brackets the quartiles, or with"
    )
    text += " fewer than eight rounds the extremes. Percentages are of a limit measured in the same rounds."
    listed = "\n".join(f"- {line}" for line in shortfalls(results))
    parts = ["# Results", f"{caption(results)}.", text, listed, WHY, markdown(table(results)), charts]
    return "\n\n".join(parts) + "\n"


def elsewhere(folder: Path) -> list[Path]:
    """The results of other machines, each in a folder of its own below this."""
    return sorted(folder.glob("*/results.json"))


def on_other_machines(folder: Path) -> str:
    lines = [
        f"- {machine(results)}: [{path.parent.name}]({path.parent.name}/README.md), {shortfalls(results)[0]}"
        for path in elsewhere(folder)
        for results in [load(path)]
    ]
    note = "The goals were set for the machine of this page.\n\n"
    return "\n## On other machines\n\n" + note + "\n".join(lines) + "\n" if lines else ""


def on_a_gpu(folder: Path) -> str:
    """What python -m benchmarks.gpu measured, if its gpu.json is in the folder: a line for each case and pass."""
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
        f"bfloat16 {quantity(rates['matmul'], 'FLOP/s')}. Medians of the GPU's own clock, with an empty L2 cache. The "
        "percentage is that of the faster of our backends."
    )
    return f"\n## On a GPU\n\n{head}\n\n{markdown(lines)}\n\n![on a GPU](gpu.png)\n"


def insert(text: str, made: str) -> str:
    """`text` with `made` between its markers. Raises ValueError unless it has both, once."""
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the lines {begin!r} and {end!r}, once each and in this order")
    return re.sub(re.escape(begin) + r".*" + re.escape(end), lambda _: f"{begin}\n{made}\n{end}", text, flags=re.DOTALL)


# ---- charts


def draw(results: Results, folder: Path) -> None:
    """attention.png and roofline.png, where the results have something to show in them."""
    for name, chart in (("attention", attention_chart), ("roofline", roofline_chart)):
        figure = Figure(figsize=(10, 7), layout="constrained")
        if chart(results, figure):
            with atomic_file(folder / f"{name}.png") as aside:
                figure.savefig(aside, dpi=110, format="png")


def limit_of(results: Results, name: str) -> float | None:
    limit = results["limits"].get(name)
    return None if limit is None else float(limit["rate"][0])


def attention_chart(results: Results, figure: Figure) -> bool:
    """Speed against sequence length: a panel for each dtype and direction."""
    groups = {row["group"]: row for row in results["rows"] if "attention forward" in row["group"]}
    if not groups:
        return False
    panels = figure.subplots(2, (len(groups) + 1) // 2, squeeze=False).flat
    for group, axes in zip(groups, panels, strict=False):
        rows = [row for row in results["rows"] if row["group"] == group]
        for colour, D in zip(
            ("tab:blue", "tab:orange", "tab:green"), sorted({row["extra"]["D"] for row in rows}), strict=False
        ):
            line = [row for row in rows if row["extra"]["D"] == D]
            lengths = [row["extra"]["S"] for row in line]
            for side, style, label in (("ours", "o-", "gptcore"), ("reference", "x--", line[0]["against"])):
                speeds = [row["flops"] / row[side][0] / 1e9 for row in line]
                axes.plot(lengths, speeds, style, color=colour, label=f"{label}, D={D}")
        if (rate := limit_of(results, rows[0]["limit"])) is not None:
            axes.axhline(rate / 1e9, color="grey", linestyle=":", label="PyTorch's matmul")
        axes.set(title=group, xlabel="sequence length", ylabel="GFLOP/s", xscale="log", ylim=(0, None))
        axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return True


def roofline_chart(results: Results, figure: Figure) -> bool:
    """Speed against FLOPs per byte (Williams, Waterman and Patterson 2009), under the rates of the same run."""
    rows = [row for row in results["rows"] if row["flops"] and row["bytes"]]
    if not rows:
        return False
    axes = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    x = [min(intensities) / 2, max(intensities) * 2]
    for dtype, colour in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
        compute = limit_of(results, f"matmul {dtype}")
        memory = max(filter(None, (limit_of(results, name) for name in ("copy", "read"))), default=None)
        if compute is not None and memory is not None:
            ridge = compute / memory
            points = [x[0], min(max(ridge, x[0]), x[1]), x[1]]
            roof = [min(compute, memory * intensity) / 1e9 for intensity in points]
            axes.plot(points, roof, color=colour, label=f"limit: the memory's rate, then matmul {dtype}")
        mine = [(i, row) for i, row in zip(intensities, rows, strict=True) if row["group"].endswith(dtype)]
        for side, marker, label in (("ours", "o", "gptcore"), ("reference", "x", "reference")):
            speeds = [row["flops"] / row[side][0] / 1e9 for _, row in mine]
            if mine:
                axes.scatter([i for i, _ in mine], speeds, marker=marker, color=colour, label=f"{label}, {dtype}")
    named: set[str] = set()
    for intensity, row in zip(intensities, rows, strict=True):
        kind = row["group"].rpartition(" ")[0]
        if kind not in named:
            axes.annotate(kind, (intensity, row["flops"] / row["ours"][0] / 1e9), fontsize=7, rotation=20)
            named.add(kind)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="GFLOP/s")
    axes.set_title("Kernels under the roofline (FLOPs of GELU and layer norm are nominal: 30 and 20 an element)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return True


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
    write(folder / "README.md", lambda: full(results) + on_other_machines(folder) + on_a_gpu(folder))
    if folder.resolve() == COMMITTED:
        readme = ROOT / "README.md"
        write(readme, lambda: insert(readme.read_text(encoding="utf-8"), summary(results)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
