"""The parts of the project's README.md that follow from results.json, gpu.json and the registry of operations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tables import COMMITTED, Results, between, elsewhere, hardware, load, markdown
from gptcore.files import read_json
from gptcore.ops import registry

BEGIN, END = "<!-- {} by python -m benchmarks.report: do not edit -->", "<!-- end of {} -->"


class Headline(NamedTuple):
    """Rows of results.json that the README shows: `group` matches all of a group's name, `case` the start of a case."""

    label: str
    group: str
    case: str = ""


# The benchmarks in the chart, each in float32 and bfloat16
CHARTED = [
    Headline(
        "attention, forward + backward\n12 heads of 64, 1,024 tokens", r"attention forward \+ backward", "D=64 S=1024"
    ),
    Headline("GPT-2 124M, training step\nbatch of 4 x 256 tokens", "GPT-2 124M training step"),
]
# The rows of the README's table
SHOWN = [
    Headline("attention, forward + backward", r"attention forward \+ backward"),
    Headline("attention, one new token (decoding)", "attention decode"),
    Headline("GELU, forward + backward", r"GELU forward \+ backward"),
    Headline("layer norm with residual, forward + backward", r"layer norm with residual forward \+ backward"),
    Headline("GPT-2 124M training step", "GPT-2 124M training step"),
    Headline("GPT-2 124M generation", "generation"),
]
DTYPES = "float32", "bfloat16"
THEIRS = "PyTorch", "transformers", "PyTorch's fused operations"  # references that are other people's code


def find(results: Results, headline: Headline, dtype: str) -> list[dict[str, Any]]:
    """Return the rows of a headline in one dtype, by autocast or with weights of that dtype, against others' code."""
    return [
        row
        for row in results["rows"]
        if re.fullmatch(rf"{headline.group} {dtype}( autocast)?", row["group"])
        and row["case"].startswith(headline.case)
        and row["against"] in THEIRS
    ]


def speedup(rows: list[dict[str, Any]]) -> str:
    return between([row["ratio"][0] for row in rows], ".2f")


def slower(results: Results) -> dict[str, str]:
    """Return each group with cases in which the reference is faster, with the ratios of those cases."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["against"] in THEIRS and row["ratio"][0] < 1:
            groups.setdefault((row["group"], row["against"]), []).append(row)
    return {group: f"{group} ({speedup(rows)} of {against})" for (group, against), rows in groups.items()}


def claims(results: Results, folder: Path = COMMITTED) -> str:
    """Return three lines about speed, each with its hardware."""

    def on(machine: Results, headline: Headline, against: str) -> str:
        bfloat16, float32 = (speedup(find(machine, headline, dtype)) for dtype in ("bfloat16", "float32"))
        return f"{bfloat16} times as fast as {against} in bfloat16, {float32} in float32 ({hardware(machine)})"

    attention, step = Headline("", CHARTED[0].group), CHARTED[1]
    machines = [results, *map(load, elsewhere(folder))]
    lines = [
        "**Attention**, forward and backward: " + "; ".join(on(m, attention, "PyTorch's") for m in machines),
        "**A training step of GPT-2 124M**: " + "; ".join(on(m, step, "transformers'") for m in machines),
    ]
    if (folder / "gpu.json").exists():
        found = read_json(folder / "gpu.json")
        ranges = [between(gpu_ratios(found, name), ".2f") for name in ("SDPA flash", "SDPA cudnn")]
        lines.append(
            f"**On a GPU**, attention in bfloat16: {ranges[0]} times as fast as FlashAttention in PyTorch, but "
            f"{ranges[1]} times as fast as cuDNN ({found['gpu']}, forward and backward apart)"
        )
    return "\n".join(f"- {line}." for line in lines)


def gpu_ratios(found: Results, reference: str) -> list[float]:
    """Return the time of a reference by that of our faster backend, for each case and pass of attention."""
    rows = [row for row in found["rows"] if row["op"] == "attention" and row["ms"]]
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row["case"], row["pass"]), {})[row["name"]] = row["ms"]
    return [
        here[reference] / min(time for name, time in here.items() if name.startswith("gptcore"))
        for here in times.values()
        if reference in here
    ]


def summary(results: Results, folder: Path = COMMITTED) -> str:
    """Return the README's table of ratios, the cases that are slower, and where all rows are."""
    lines = [["times as fast as the reference", *DTYPES, "reference"]]
    for headline in SHOWN:
        found = {dtype: find(results, headline, dtype) for dtype in DTYPES}
        if against := {row["against"] for rows in found.values() for row in rows}:
            ratios = [speedup(found[dtype]) if found[dtype] else "" for dtype in DTYPES]
            lines.append([headline.label, *ratios, ", ".join(sorted(against))])
    others = [(load(path), f"benchmarks/results/{path.parent.name}/README.md") for path in elsewhere(folder)]
    here = slower(results)
    losses = [f"Slower than the reference on {hardware(results)}: {'; '.join(here.values()) or 'no case'}."]
    for other, _ in others:
        there = [text for group, text in slower(other).items() if group not in here]
        losses.append(f"Also slower on {hardware(other)}: {'; '.join(there) or 'no case'}.")
    links = [f"[{hardware(results)}](benchmarks/results/README.md)", *(f"[{hardware(r)}]({to})" for r, to in others)]
    return "\n\n".join([
        f"Medians on {hardware(results)}, PyTorch {results['versions']['torch']}, {results['date']}. A range is over "
        "sequence lengths, head sizes or batch sizes.",
        markdown(lines),
        " ".join(losses) + " A *call* is one on a few numbers: it measures Python and autograd, not the kernel.",
        f"All rows, with their spread and the goals that are missed: {', '.join(links)}.",
    ])  # fmt: skip


def support() -> str:
    """Return the README's table of operations, backends and dtypes, from the registry."""
    names = ("cpu", "cuda", "triton", "torch")
    formula = registry.BACKENDS["torch"].implementations
    lines = [["operation", *names]]
    for operation in formula:
        cells = []
        for name in names:
            backend = registry.BACKENDS[name]
            own = name == "torch" or backend.implementations.get(operation) is not formula[operation]
            short = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
            cells.append(short if own else "PyTorch's")
        lines.append([f"`{operation}`", *cells])
    return markdown(lines)


def insert(text: str, name: str, made: str) -> str:
    """Return `text` with `made` between the markers of that name. Raises ValueError unless it has both, once."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the lines {begin!r} and {end!r}, once each and in this order")
    return re.sub(re.escape(begin) + r".*" + re.escape(end), lambda _: f"{begin}\n{made}\n{end}", text, flags=re.DOTALL)


def readme(text: str, results: Results) -> str:
    """Return the project's README with the parts that are made here."""
    parts = {"claims": claims(results), "support": support(), "results": summary(results)}
    for name, made in parts.items():
        text = insert(text, name, made)
    return text
