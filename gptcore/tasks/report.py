"""The report of a fine-tuning run: report.json and report.html, one file without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gptcore.files import atomic_file, write_json
from gptcore.prepare.page import document, table
from gptcore.tasks.task import Result

WORST = 20  # errors shown
LARGEST = 40  # labels in the picture of the confusion matrix


@dataclass
class Report:
    """What was learnt, from what, and how well."""

    task: str
    model: str
    metric: str
    result: Result
    baselines: dict[str, dict[str, float]]
    options: dict[str, Any]
    examples: dict[str, int]
    steps: int
    best_step: int | None

    def to_json(self) -> dict[str, Any]:
        result = self.result
        return {
            "task": self.task,
            "model": self.model,
            "metric": self.metric,
            "metrics": result.metrics,
            "baselines": self.baselines,
            "classes": {name: scores._asdict() for name, scores in result.classes.items()},
            "confusion": None if result.confusion is None else result.confusion.tolist(),
            "labels": result.labels,
            "errors": result.errors[:WORST],
            "number_of_errors": len(result.errors),
            "examples": self.examples,
            "steps": self.steps,
            "best_step": self.best_step,
            "options": self.options,
        }

    def lines(self) -> list[str]:
        """Return the metrics beside the baselines', for the terminal."""
        return metric_lines({"model": self.result.metrics, **self.baselines})


def metric_lines(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table of metrics; the first row says which."""
    names = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>18}" for name in names)]
    for name, values in rows.items():
        cells = (f"{values[metric]:>18.4f}" if metric in values else f"{'':>18}" for metric in names)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return lines


def class_lines(result: Result) -> list[str]:
    """Return a table of the scores of each label, if there are any."""
    if not result.classes:
        return []
    width = max(map(len, result.classes))
    lines = [f"{'':<{width}}{'precision':>18}{'recall':>18}{'f1':>18}{'support':>18}"]
    for name, s in result.classes.items():
        lines.append(f"{name:<{width}}{s.precision:>18.4f}{s.recall:>18.4f}{s.f1:>18.4f}{s.support:>18,}")
    return lines


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html."""
    write_json(folder / "report.json", report.to_json())
    with atomic_file(folder / "report.html") as aside:
        aside.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """Return the page."""
    result = report.result
    numbers = list(result.metrics)
    rows = [(f"<b>{escape(report.model)}, fine-tuned</b>", *(f"{value:.4f}" for value in result.metrics.values()))]
    for name, values in report.baselines.items():
        rows.append((escape(name), *(f"{values[n]:.4f}" if n in values else "" for n in numbers)))
    parts = [
        f"<p>Task {escape(report.task)}: {report.examples['train']:,} training and {report.examples['validation']:,} "
        f"validation examples, {report.steps:,} steps; the weights are those of "
        f"step {report.best_step or report.steps:,}.</p>",
        "<h2>Metrics on the validation set</h2>",
        table(["", *map(escape, numbers)], rows, range(1, len(numbers) + 1)),
    ]  # fmt: skip
    if result.classes:
        cells = [
            (escape(name), f"{s.precision:.4f}", f"{s.recall:.4f}", f"{s.f1:.4f}", f"{s.support:,}")
            for name, s in result.classes.items()
        ]
        heads = ["label", "precision", "recall", "F1", "examples"]
        parts += ["<h2>Each label</h2>", table(heads, cells, range(1, 5))]
    if result.confusion is not None:
        parts += ["<h2>Confusion matrix</h2>", _picture(result)]
    shown = result.errors[:WORST]
    parts += [f"<h2>The worst errors: {len(shown)} of {len(result.errors):,}</h2>"]
    if shown:
        heads = list(shown[0])
        parts.append(table(list(map(escape, heads)), [[_cell(error[head]) for head in heads] for error in shown]))
    return document("Fine-tuning report", parts)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value)) or "none"
    return escape(f"{value:.4f}" if isinstance(value, float) else str(value))


def _picture(result: Result) -> str:
    """Return the confusion matrix as an SVG: rows are true, columns predicted, shades are shares of a row."""
    counts, labels = result.confusion, result.labels
    assert counts is not None
    if len(labels) > LARGEST:
        return f"<p>{len(labels)} labels are too many for a picture; report.json has the matrix.</p>"
    size, left, top = 46, 150, 110
    parts = []
    for i, label in enumerate(labels):
        at, name = i * size + size / 2, escape(label if len(label) <= 20 else label[:19] + "…")
        parts.append(f'<text x="{left - 8}" y="{top + at + 4:.0f}" text-anchor="end">{name}</text>')
        parts.append(f'<text transform="translate({left + at:.0f} {top - 8}) rotate(-45)">{name}</text>')
        for j, count in enumerate(counts[i]):
            share = count / max(1, counts[i].sum())
            place = f'x="{left + j * size}" y="{top + i * size}" width="{size - 1}" height="{size - 1}"'
            parts.append(f'<rect {place} fill="#2f6fb0" fill-opacity="{share:.3f}" stroke="#8884"/>')
            middle = (
                f'x="{left + j * size + size / 2:.0f}" y="{top + i * size + size / 2 + 4:.0f}" text-anchor="middle"'
            )
            parts.append(f"<text {middle}{' style=fill:#fff' if share > 0.6 else ''}>{count}</text>")
    width, height = left + size * len(labels) + 60, top + size * len(labels)
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="confusion matrix">'
        f"{''.join(parts)}</svg><p><small>rows: true; columns: predicted</small></p>"
    )
