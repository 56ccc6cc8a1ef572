"""What ends a run early, which weights it ends with, and the curves that it reports elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import losses, same, tiny_trainer, weights

from gptcore.training.callbacks import TrainerCallback, read_log
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.trainer import Trainer


class Metrics(TrainerCallback):
    """Adds a metric to each evaluation, by its number, and keeps the weights of each."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values, self.weights = list(values), [{}]
        self.losses: Sequence[float] = ()  # instead of the model's

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        metrics["score"] = self.values[trainer.state.global_step - 1]
        if self.losses:
            metrics["eval_loss"] = self.losses[trainer.state.global_step - 1]
        self.weights.append(weights(trainer.model))


def scored_trainer(folder: Path, values: Sequence[float], **changes: Any) -> tuple[Trainer, Metrics]:
    callback = Metrics(values)
    settings: dict[str, Any] = {"eval_steps": 1, "metric_for_best_model": "score", "max_steps": len(values)}
    return tiny_trainer(folder, [callback], **settings | changes), callback


@pytest.mark.parametrize(
    ("greater", "values", "best"),
    [(False, [3, 1, 2, 1], 2), (True, [1, 3, math.nan, 2], 2), (False, [math.nan, 2, math.inf, 3], 2)],
)
def test_the_best_model_is_loaded(tmp_path: Path, greater: bool, values: list[float], best: int) -> None:
    settings: Any = {"load_best_model_at_end": True, "save_steps": 1, "save_total_limit": 1}
    trainer, seen = scored_trainer(tmp_path, values, greater_is_better=greater, **settings)
    trainer.train()
    assert (trainer.state.best_step, trainer.state.best_metric) == (best, values[best - 1])
    assert same(weights(trainer.model), seen.weights[best])
    assert not same(seen.weights[best], seen.weights[-1])
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{best}", f"checkpoint-{len(values)}"]


def test_without_a_finite_metric_there_is_no_best(tmp_path: Path) -> None:
    trainer, seen = scored_trainer(tmp_path, [math.nan] * 2, load_best_model_at_end=True, save_steps=1)
    with pytest.warns(UserWarning, match="no evaluation had a finite metric"):
        trainer.train()
    assert same(weights(trainer.model), seen.weights[-1])


def test_patience_counts_evaluations_across_a_resume(tmp_path: Path) -> None:
    values = [5, 4, 4, 6, 3.5, 4, 4, 4, 1, 1]
    trainer, _ = scored_trainer(tmp_path / "whole", values, early_stopping_patience=3)
    assert trainer.train().global_step == 8
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == ["checkpoint-8"]

    trainer, _ = scored_trainer(tmp_path / "parts", values, max_steps=7, early_stopping_patience=3, save_steps=7)
    trainer.train()
    trainer, _ = scored_trainer(tmp_path / "parts", values, max_steps=7, early_stopping_patience=3)
    trainer.args.max_steps = 10
    with pytest.warns(UserWarning, match="total_steps 7 -> 10"):
        assert trainer.train(resume_from_checkpoint=True).global_step == 8
    assert trainer.train(resume_from_checkpoint=True).global_step == 8, "it has ended, unless patience is raised"


@pytest.mark.parametrize(
    ("values", "losses", "end"),
    [
        ([0] * 6, [6, 5, 4, 3, 2, 1], 6),  # the model learns, which the metric does not show yet
        ([0] * 6, [6, 5, 5, 5, 5, 4], 4),
        ([0, 0, 0, 1, 0, 0], [6, 5, 4, 3, 2, 1], 6),
        ([0, 0, 1, 1, 1, 1], [6, 5, 4, 3, 2, 1], 5),  # it has improved once, so that the loss has no say any more
        ([1, 0, 0, 0, 0, 0], [3, 2, 1, 1, 1, 1], 5),
    ],
)
def test_patience_begins_when_the_metric_or_the_loss_stops_improving(
    tmp_path: Path, values: list[float], losses: list[float], end: int
) -> None:
    settings: Any = {"early_stopping_patience": 2, "greater_is_better": True}
    trainer, seen = scored_trainer(tmp_path, values, **settings)
    seen.losses = losses
    assert trainer.train().global_step == end


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, eval_steps=1, metric_for_best_model="eval_los")
    with pytest.raises(ValueError, match="metric_for_best_model is 'eval_los', but an evaluation has eval_loss, perpl"):
        trainer.train()


def test_max_time_ends_with_a_checkpoint_and_resumes(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "parts", max_time=1e-6)
    assert trainer.train().global_step == 1
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-1"]
    resumed, whole = tiny_trainer(tmp_path / "parts"), tiny_trainer(tmp_path / "whole")
    assert resumed.train(resume_from_checkpoint=True).global_step == whole.train().global_step == 6
    assert same(weights(resumed.model), weights(whole.model))


def test_run_json_has_arguments_versions_data_and_code(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["args"]["learning_rate"] == 1e-2
    assert run["schedule"] == {"total_steps": 6}
    assert run["data"]["examples"] == 22
    assert len(run["environment"]["code"]) == 16
    assert {"torch", "numpy", "python", "cpu", "vocabulary"} <= run["environment"].keys()


def test_mfu_is_of_the_peak_that_was_given(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, peak_flops=1e12, data=[torch.arange(8)] * 22)
    trainer.train()
    entry = read_log(tmp_path / "log.jsonl")[-1]
    flops = trainer.model.estimate_flops(8, backward=True) / 8
    assert entry["mfu"] == pytest.approx(flops * entry["tokens_per_second"] / 1e12)
    tiny_trainer(tmp_path / "unknown").train()
    assert "mfu" not in read_log(tmp_path / "unknown" / "log.jsonl")[-1]


# ---- report_to -------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_trainer(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(entry["step"], pytest.approx(entry["loss"])) for entry in losses(tmp_path)]


@pytest.mark.slow
def test_wandb_has_the_numbers_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        tiny_trainer(tmp_path, report_to="wandb", learning_rate=0.0123).train()
    finally:
        wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for entry in losses(tmp_path):
        assert b"loss\x82\x01" + bytes([len(repr(entry["loss"]))]) + repr(entry["loss"]).encode() in written
    assert b"learning_rate\x82\x01\x060.0123" in written  # of the arguments


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'report_to {name}: .* pip install "gptcore\[{name}\]"'):
        tiny_trainer(tmp_path, report_to=name)
