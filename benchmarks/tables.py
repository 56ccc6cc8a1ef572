"""Results as text: numbers with units, table rows, goals that are missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.goals import Outcome, outcomes
from gptcore.files import read_json

SCHEMA = 1
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
HEADING = ["operation", "case", "ours", "reference", "ratio", "of the limit", "goal"]

ISA_NAMES = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}

Results = dict[str, Any]


def load(path: Path) -> Results:
    """Return the contents of a results.json. Raises ValueError for another schema."""
    results = read_json(path)
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {results.get('schema')}, expected {SCHEMA}: measure again (make bench)")
    return results


def joined(parts: list[Results]) -> Results:
    """Return the results of several processes as one: all rows, and each limit from its most frequent measurement."""
    limits: dict[str, Any] = {}
    for part in parts:
        for name, limit in part["limits"].items():
            if name not in limits or limit["rounds"] > limits[name]["rounds"]:
                limits[name] = limit
    return {**parts[0], "limits": limits, "rows": [row for part in parts for row in part["rows"]]}


def quantity(value: float, unit: str) -> str:
    """Format a value with three digits and a prefix: 0.00123 s is 1.23 ms."""
    prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")]
    scale, prefix = next((pair for pair in prefixes if value >= 0.9995 * pair[0]), prefixes[-1])
    digits = value / scale
    return f"{digits:.{0 if digits >= 99.95 else 1 if digits >= 9.995 else 2}f} {prefix}{unit}"


def machine(results: Results) -> str:
    return f"{results['cpu']}, {results['threads']} threads, {results['isa']} kernels"


def cpu(results: Results) -> str:
    """Return the CPU's name without trademarks: `Intel(R) Xeon(R) Processor` is `Intel Xeon`."""
    return results["cpu"].replace("(R)", "").removesuffix(" Processor")


def hardware(results: Results) -> str:
    isa = ISA_NAMES.get(results["isa"], results["isa"])
    return f"{cpu(results)} ({isa}, {results['threads']} threads)"


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
    """Format a ratio with its quartiles, and a note if they include 1."""
    median, low, high = ratio
    return f"{median:.2f} x ({low:.2f} to {high:.2f})" + ", no difference beyond the spread" * (low <= 1 <= high)


def table(results: Results) -> list[list[str]]:
    """Return the heading, then the cells of every row."""
    lines = [HEADING]
    for row in results["rows"]:
        measured = [quantity(row[side][0], row["unit"]) for side in ("ours", "reference")]
        if "tokens" in row["extra"]:
            measured = [f"{row['extra']['tokens'] / row[side][0]:,.0f} tokens/s" for side in ("ours", "reference")]
        limit = (
            "" if row["percent"] is None else "{:.0f} % ({:.0f} to {:.0f}) of {}".format(*row["percent"], row["limit"])
        )
        goals = "; ".join(f"{goal.goal:g} {goal.unit} {goal.verdict}" for goal in outcomes(row, results["isa"]))
        measured[1] += f", {row['against']}"
        lines.append([row["group"], row["case"], *measured, times(row["ratio"]), limit, goals])
    return lines


def shortfalls(results: Results) -> list[str]:
    """Return a line on all goals, and one for each goal that is missed."""
    found = [(row, goal) for row in results["rows"] for goal in outcomes(row, results["isa"])]
    missed = [
        f"{goal.verdict}: {row['group']}, {row['case']}: {goal.measured.median:.2f} of {goal.goal:g} {goal.unit}"
        + ceiling(row, goal, results["rows"])
        for row, goal in found
        if not goal.met
    ]
    return [f"{len(found) - len(missed)} of {len(found)} goals met", *missed]


def ceiling(row: dict[str, Any], goal: Outcome, rows: list[dict[str, Any]]) -> str:
    """Return why a goal is missed: the ratio at the full limit, or the rows that measure the obstacle."""
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
        if "without its matmuls" in other["group"]:  # the matmuls at the limit's rate, and our time for the rest
            most = measured / (share + other["ratio"][0])
            found += f"; the whole of {row['limit']} and the rest at its own speed would be {most:.2f} {goal.unit}"
        elif goal.unit == "%":
            found += f"; {other['group']}, {other['case']}: {other['percent'][0]:.0f} %"
        elif "parts removed" in other["group"]:
            found += f"; {other['case']}: {measured * other['ratio'][0]:.2f} x"
        else:
            found += f"; {other['group']}: {measured * other['ratio'][0]:.2f} x"
    return found or whole


def markdown(lines: list[list[str]]) -> str:
    heading, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *rest])


def between(values: list[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def limit_of(results: Results, name: str) -> float | None:
    limit = results["limits"].get(name)
    return None if limit is None else float(limit["rate"][0])


def elsewhere(folder: Path) -> list[Path]:
    """Return the paths of the results of other machines, each in its own folder below this one."""
    return sorted(folder.glob("*/results.json"))
