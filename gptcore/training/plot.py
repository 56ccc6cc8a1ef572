"""The loss curve of a run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptcore.files import PathLike, atomic_file


def plot_loss(entries: Sequence[dict[str, Any]], path: PathLike) -> None:
    """Draw training and validation loss over steps from the entries of log.jsonl into a PNG.

    Raises ImportError without matplotlib (pip install "gptcore[plot]").
    """
    from matplotlib.figure import Figure  # no pyplot: it would choose a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
