"""float16 with a scaled loss: what overflows is skipped, resumed and ended; and arguments that mean nothing."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_synchronisation import Launches
from tiny import losses, same, tiny_model, tiny_trainer, weights

from gptcore.training.callbacks import TrainerCallback
from gptcore.training.mixed_precision import MixedPrecision
from gptcore.training.state import NonFiniteError
from gptcore.training.trainer import Trainer

DATA = [torch.arange(i, i + 8) % 32 for i in range(32)]


def overflow(trainer: Trainer, steps: range) -> list[int]:
    """Make the gradient infinite in the steps given; return the steps that updated the weights, as they are done."""
    trainer.model.ln_f.weight.register_hook(lambda g: g * float("inf") if trainer.state.global_step in steps else g)
    updated: list[int] = []

    class Record(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            updated.append(trainer.state.global_step)

    trainer.callbacks.append(Record())
    return updated


def fp16_trainer(folder: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {"fp16": True, "max_steps": 12, "save_steps": 4, "learning_rate": 3e-3}
    return tiny_trainer(folder, data=DATA, **settings | changes)


def test_float16_computes_in_float16_and_learns_as_float32(tmp_path: Path) -> None:
    trainer, wide = (
        tiny_trainer(
            tmp_path / str(fp16), model=tiny_model(dropout=0.0), data=DATA, fp16=fp16, max_steps=60, learning_rate=3e-3
        )
        for fp16 in (True, False)
    )
    seen = set()
    trainer.model.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    wide.train()
    assert seen == {torch.float16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    narrow, plain = ([entry["loss"] for entry in losses(tmp_path / name)] for name in ("True", "False"))
    assert plain[-1] < 0.8 * plain[0]
    assert narrow == pytest.approx(plain, rel=2e-2)
    assert narrow != plain
    assert "float16 by autocast, loss scaled by 65536" in trainer.plan()


def test_weights_are_cast_once_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's linear layers, which a dispatch mode chooses, as on a GPU; with the bits of a cast each time."""
    results = []
    for name in ("kept", "anew"):
        if name == "anew":
            monkeypatch.setattr(MixedPrecision, "kept_casts", lambda _: contextlib.nullcontext())
        trainer = tiny_trainer(
            tmp_path / name, data=DATA, bf16=True, max_steps=2, gradient_accumulation_steps=3, logging_steps=0
        )
        compute, casts = trainer.loss_of, []

        def loss_of(batch: Any, compute: Any = compute, casts: list[int] = casts) -> torch.Tensor:
            with Launches() as launches:
                loss: torch.Tensor = compute(batch)
            casts.append(launches.counts["_to_copy"])
            return loss

        trainer.loss_of = loss_of  # type: ignore[method-assign]
        out = trainer.train()
        results.append((casts, out.training_loss, weights(trainer.model)))
    (kept, loss, ours), (anew, other_loss, theirs) = results
    of_weights = 2 * 8  # of 2 layers
    assert anew == 6 * [anew[0]]
    assert kept == 2 * [anew[0], anew[0] - of_weights, anew[0] - of_weights]
    assert loss == other_loss
    assert same(ours, theirs)


def test_overflows_are_skipped_and_the_schedule_waits(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path)
    updated = overflow(trainer, range(3, 5))
    before: list[Any] = []

    class Remember(TrainerCallback):
        def on_log(self, trainer: Trainer, logs: dict[str, Any]) -> None:
            before.append(weights(trainer.model))

    trainer.callbacks.append(Remember())
    trainer.train()
    log = losses(tmp_path)
    assert updated == [step for step in range(1, 13) if step not in (4, 5)]
    assert same(before[2], before[3])
    assert same(before[3], before[4])
    assert not same(before[4], before[5])
    assert [entry["loss_scale"] for entry in log] == [65536.0] * 3 + [32768.0] + [16384.0] * 8
    assert [entry["overflow_steps"] for entry in log] == [0] * 3 + [1] + [2] * 8
    rates = [entry["learning_rate"] for entry in log]
    assert rates[5] == pytest.approx(3e-3 * (12 - 3) / 12)
    assert "loss" not in log[3]


def test_clipping_acts_on_gradients_without_the_scale(tmp_path: Path) -> None:
    for fp16 in (True, False):
        trainer = tiny_trainer(
            tmp_path / str(fp16), model=tiny_model(dropout=0.0), fp16=fp16, max_steps=1, max_grad_norm=0.1
        )
        trainer.train()
    narrow, wide = (losses(tmp_path / name)[0]["grad_norm"] for name in ("True", "False"))
    assert narrow == pytest.approx(wide, rel=1e-2)


@pytest.mark.parametrize("cut", [4, 8])
def test_a_run_with_overflows_resumes_bit_exactly(tmp_path: Path, cut: int) -> None:
    whole = fp16_trainer(tmp_path / "whole")
    overflow(whole, range(3, 7))
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in range(cut + 1, 13):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}", ignore_errors=True)
    resumed = fp16_trainer(tmp_path / "parts")
    overflow(resumed, range(3, 7))
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert resumed.state.scaler == whole.state.scaler


def test_a_scale_at_its_floor_stops(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, max_steps=60)
    overflow(trainer, range(60))
    message = "step 17: the gradient overflows float16 with a loss scale of 1, the lowest; 17 of 17 steps overflowed"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"fp16": True}, torch.float16, "fp16=True computes in float16 with float32 weights, .* torch.float16; use"),
        ({"fp16": True, "bf16": True}, torch.float32, "bf16 and fp16 are both given"),
        ({"tf32": True}, torch.float32, "tf32 is True, but it sets how GPUs multiply"),
        ({"matmul_precision": "high"}, torch.float32, "matmul_precision is high, but it sets how GPUs multiply"),
        ({"tf32": True, "matmul_precision": "high"}, torch.float32, "tf32 and matmul_precision are both given"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: Any, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "out", model=tiny_model().to(dtype), **changes).train()
    assert not (tmp_path / "out").exists()


def test_a_device_without_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fp16=True needs a device with float16, .* but the model is on meta"):
        tiny_trainer(tmp_path, model=tiny_model().to("meta"), fp16=True)
