"""The arguments of a run and its learning rates."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.training.arguments import TrainingArguments, lr_at, total_steps

# ---- arguments and schedule ------------------------------------------------------------------------------------------


def test_defaults_are_those_of_hugging_face() -> None:
    assert dataclasses.asdict(TrainingArguments("out")) == {
        "output_dir": "out", "overwrite_output_dir": False, "num_train_epochs": 3.0, "max_steps": -1,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "warmup_ratio": 0.0,
        "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "logging_steps": 500, "eval_steps": None, "save_steps": 500, "save_total_limit": None, "seed": 42,
        "bf16": False, "fp16": False, "disable_tqdm": False, "load_best_model_at_end": False,
        "gradient_reduction": "tree", "parallel": "data", "min_lr_ratio": 0.0, "lr_power": 1.0, "lr_decay_ratio": 0.1,
        "tf32": False,
        "matmul_precision": "default", "metric_for_best_model": "eval_loss", "greater_is_better": False,
        "early_stopping_patience": None, "max_time": None, "report_to": "none", "peak_flops": None,
        "gradient_checkpointing": False, "torch_compile": False, "cuda_graph": False, "packing": False,
        "group_by_length": False,
    }  # fmt: skip
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainingArguments))
    assert TrainingArguments(Path("out"), num_train_epochs=2).num_train_epochs == 2.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", -1), ("gradient_accumulation_steps", 0),
        ("max_steps", 0), ("max_steps", -2), ("num_train_epochs", 0.0), ("num_train_epochs", math.nan),
        ("learning_rate", 0.0), ("learning_rate", math.inf), ("lr_scheduler_type", "cosin"), ("warmup_steps", -1),
        ("weight_decay", -0.1), ("adam_beta1", 1.0), ("adam_beta2", -0.1), ("adam_epsilon", 0.0),
        ("max_grad_norm", -1.0), ("logging_steps", -1), ("eval_steps", 0), ("save_steps", -5), ("save_total_limit", 0),
        ("seed", -1), ("seed", 2**32),
    ],
)  # fmt: skip
def test_wrong_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        TrainingArguments("out", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", 1.5), ("eval_steps", 0.1), ("bf16", "yes"), ("learning_rate", "1")]
)
def test_wrong_types_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} should be of type .* not {value!r}"):
        TrainingArguments("out", **{name: value})


def schedule(kind: Any, warmup: int, total: int, **more: Any) -> list[float]:
    args = TrainingArguments("out", learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup, **more)
    return [lr_at(step, args, total) for step in range(total)]


@pytest.mark.parametrize("folder", [None, 3, ""])
def test_output_dir_is_a_path(folder: Any) -> None:
    with pytest.raises(TypeError, match=f"output_dir should be the path of a folder, not {folder!r}"):
        TrainingArguments(folder)


def test_schedules() -> None:
    assert schedule("linear", 0, 4) == [1, 0.75, 0.5, 0.25]
    assert schedule("linear", 3, 8) == pytest.approx([0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2])
    assert schedule("constant", 1, 4) == [0.5, 1, 1, 1]
    assert schedule("cosine", 0, 4) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert schedule("cosine", 0, 4, min_lr_ratio=0.5) == pytest.approx([1, 0.75 + 0.5**2.5, 0.75, 0.75 - 0.5**2.5])
    assert schedule("polynomial", 0, 4, lr_power=2.0) == [1, 0.5625, 0.25, 0.0625]
    stable = [0.5, *[1.0] * 5, 1.0, 0.75, 0.5, 0.25]
    assert schedule("warmup_stable_decay", 1, 10, lr_decay_ratio=0.4) == pytest.approx(stable)
    assert schedule("warmup_stable_decay", 0, 3) == [1, 1, 1]  # a tenth of three steps is less than one
    assert schedule("linear", 0, 8, warmup_ratio=0.3) == schedule("linear", 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are both given"),
        ({"parallel": "fsdp", "gradient_reduction": "all_reduce"}, "parallel 'fsdp' and gradient_reduction are both"),
        ({"lr_power": 2.0}, "lr_power has no effect with lr_scheduler_type 'linear'; it is for polynomial"),
        ({"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio has no effect"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations, but eval_steps is None"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations, but eval_steps is None"),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 4}, "save_steps is 4, not a multiple of eval"),
        ({"max_time": 0}, "max_time should be positive and finite"),
        ({"report_to": "tensorbord"}, "report_to 'tensorbord' is not supported; it should be of tensorboard, wandb"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingArguments("out", **arguments)


KINDS = ["linear", "cosine", "polynomial", "warmup_stable_decay", "constant"]


@given(st.sampled_from(KINDS), st.integers(1, 200), st.data())
def test_schedule_rises_then_falls_and_is_never_zero(kind: str, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    lrs = schedule(kind, warmup, total)
    assert all(0 < lr <= 1 for lr in lrs)
    assert lrs[warmup] == 1
    assert lrs[: warmup + 1] == sorted(lrs[: warmup + 1])
    assert lrs[warmup:] == sorted(lrs[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "steps"),
    [(0.07, 100, 7), (0.29, 100, 29), (1.1, 10, 11), (0.071, 100, 8), (1e-9, 3, 1), (3.0, 7, 21), (2 / 3, 300, 200)],
)
def test_epochs_are_taken_as_they_are_written(epochs: float, per_epoch: int, steps: int) -> None:
    assert total_steps(TrainingArguments("out", num_train_epochs=epochs), per_epoch) == steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 10**13), ("max_steps", 10**400), ("num_train_epochs", 1e300), ("num_train_epochs", 10**400),
        ("per_device_train_batch_size", 10**30), ("gradient_accumulation_steps", 10**400), ("save_steps", 10**30),
        ("learning_rate", 10**400), ("warmup_steps", 10**13),
    ],
)  # fmt: skip
def test_absurd_numbers_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} should be (at most 1,000,000,000,000|positive and finite), not"):
        TrainingArguments("out", **{name: value})


def test_epochs_that_take_too_many_steps_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_train_epochs is 1e\+12, which takes 1e\+13 steps of 10 an epoch"):
        total_steps(TrainingArguments("out", num_train_epochs=1e12), 10)


def test_numbers_of_numpy_and_paths_of_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    args = TrainingArguments("~/x", max_steps=np.int64(3), eval_steps=np.int32(2), learning_rate=np.float32(0.5))
    assert (args.output_dir, args.max_steps, args.eval_steps, args.learning_rate) == ("/somewhere/x", 3, 2, 0.5)
    assert [type(value) for value in (args.max_steps, args.eval_steps, args.learning_rate)] == [int, int, float]
    with pytest.raises(TypeError, match="max_steps should be of type int"):
        TrainingArguments("out", max_steps=np.float64(3))
