"""The charts of results.json."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure  # no pyplot: it would choose a display

from benchmarks.readme import CHARTED, DTYPES, find
from benchmarks.tables import Results, hardware, limit_of
from gptcore.files import atomic_file


def draw(results: Results, folder: Path) -> None:
    """Draw headline.png, attention.png and roofline.png, each if the results have rows for it."""
    charts = (
        ("headline", headline_chart, (8, 3)),
        ("attention", attention_chart, (10, 7)),
        ("roofline", roofline_chart, (10, 7)),
    )
    for name, chart, size in charts:
        figure = Figure(figsize=size, layout="constrained")
        if chart(results, figure):
            with atomic_file(folder / f"{name}.png") as aside:
                figure.savefig(aside, dpi=110, format="png")


def headline_chart(results: Results, figure: Figure) -> bool:
    """Draw the times of attention and of a training step, ours beside the reference's, in both dtypes."""
    if not all(find(results, headline, dtype) for headline in CHARTED for dtype in DTYPES):
        return False
    for axes, headline in zip(figure.subplots(1, len(CHARTED)), CHARTED, strict=True):
        rows = [find(results, headline, dtype)[0] for dtype in DTYPES]
        scale, unit = (1, "seconds") if rows[0]["ours"][0] > 0.5 else (1e3, "milliseconds")
        for side, shift, colour in (("reference", -0.2, "#b0b0b0"), ("ours", 0.2, "#1f77b4")):
            times = [row[side][0] * scale for row in rows]
            bars = axes.barh([i + shift for i in range(len(rows))], times, 0.38, color=colour)
            if side == "ours":
                axes.bar_label(bars, ["gptcore"] * len(rows), label_type="center", color="white")
                texts = [f"{row['ratio'][0]:.1f} times as fast" for row in rows]
                axes.bar_label(bars, texts, padding=4, color=colour, fontweight="bold")
            else:
                axes.bar_label(bars, [row["against"] for row in rows], label_type="center")
        axes.margins(x=0.1)
        axes.set_yticks(range(len(rows)), DTYPES)
        axes.invert_yaxis()
        axes.set_title(headline.label, fontsize=10)
        axes.set_xlabel(f"{unit}, shorter is better")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{hardware(results)}, PyTorch {results['versions']['torch']}", fontsize=9, color="grey")
    return True


def attention_chart(results: Results, figure: Figure) -> bool:
    """Draw speed against sequence length: a panel for each dtype and direction."""
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
    """Draw speed against FLOPs per byte (Williams, Waterman and Patterson 2009), with the limits of the same run."""
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
