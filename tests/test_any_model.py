"""Models other than a plain GPT, trained, saved and resumed; and what waits for their device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import losses, rows, same, tiny_model, tiny_trainer, weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gptcore import ops
from gptcore.config import GPTConfig
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.model import GPT
from gptcore.tensor_file import load_tensors
from gptcore.training import batches, optim
from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.optim import AdamW
from gptcore.training.state import NonFiniteError, UnreadSteps
from gptcore.training.trainer import Trainer


class Regression(nn.Module):
    """Not a language model: other arguments, buffers, dropout, and a loss that is a mean over numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.outer = nn.Linear(8, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        y = self.outer(self.drop(self.norm(self.inner(x)).relu()))[:, 0]
        return SimpleNamespace(loss=(y - labels).square().mean())


def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return [(row, row.sum()) for row in x]


def stack(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in examples]), "labels": torch.stack([y for _, y in examples])}


def regression_trainer(folder: Path, callbacks: Any = (), model: nn.Module | None = None, **changes: Any) -> Trainer:
    torch.manual_seed(1)
    args: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.1, "save_steps": 3}
    args |= {"logging_steps": 1, "disable_tqdm": True, "eval_steps": 4}
    arguments = TrainingArguments(str(folder), **args | changes)
    return Trainer(model or Regression(), arguments, pairs(18), pairs(5), stack, callbacks=callbacks)


class PowerCut(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.global_step == self.step:
            raise RuntimeError("power cut")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_any_module_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = regression_trainer(tmp_path / "whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < 0.8 * before
    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="power cut"):
        regression_trainer(parts, [PowerCut(5)]).train()
    resumed = regression_trainer(parts)
    resumed.train(resume_from_checkpoint=True)
    assert same(state(resumed.model), state(whole.model))
    assert losses(parts) == losses(tmp_path / "whole")
    assert "1 in matrices" not in whole.plan()
    assert "Regression" in whole.plan()
    assert "8 examples each" not in whole.plan()
    assert "4 examples each (4 x 1)" in whole.plan()

    whole.save_model(tmp_path / "saved")
    saved = load_tensors(tmp_path / "saved" / "model.safetensors")
    assert same(saved, state(whole.model))
    assert int(saved["norm.num_batches_tracked"]) > 0


class Weighed(nn.Module):
    """The mean of w * x over the numbers of a padded batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.w * x)[mask].mean())


class Counting(Weighed):
    def count_targets(self, batch: Mapping[str, Any]) -> int:
        return int(batch["mask"].sum())


def padded(lists: list[list[float]], **more: Any) -> dict[str, Any]:
    length = max(map(len, lists))
    x = torch.tensor([[*row, *[0.0] * (length - len(row))] for row in lists])
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in lists])
    return {"x": x, "mask": mask, **more}


@pytest.mark.parametrize("by", ["the collator", "the model", "shifted labels"])
def test_micro_batches_weigh_as_their_targets(tmp_path: Path, by: str) -> None:
    data = [[5.0], [1.0, 1.0, 1.0, 1.0], [2.0, 4.0], [7.0, 8.0, 9.0]]

    def collate(lists: list[list[float]]) -> dict[str, Any]:
        batch = padded(lists)
        if by == "the collator":
            batch["num_targets"] = sum(map(len, lists))
        elif by == "shifted labels":
            labels = torch.where(batch["mask"], 1, -100)
            batch["labels"] = nn.functional.pad(labels, (1, 0), value=1)  # the first of a row is not a target
        return batch

    model = Counting() if by == "the model" else Weighed()
    settings: Any = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    args = TrainingArguments(str(tmp_path), **settings, per_device_eval_batch_size=3, save_steps=0, disable_tqdm=True)
    trainer = Trainer(model, args, data, data, collate)
    mean = sum(map(sum, data)) / sum(map(len, data))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean)
    assert trainer.train().training_loss == pytest.approx(mean)
    assert trainer.last_step["grad_norm"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda model, x: (model.outer(x), 1), "returned a tuple with loss None, expected a scalar tensor"),
        (lambda model, x: SimpleNamespace(loss=None), "returned a SimpleNamespace with loss None"),
        (lambda model, x: SimpleNamespace(loss=x.sum(1)), r"with a loss of shape \(4,\), expected a scalar"),
    ],
)
def test_what_is_not_a_loss_is_named(tmp_path: Path, output: Any, message: str) -> None:
    model = Regression()
    model.forward = lambda x, labels: output(model, model.inner(x))  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=message):
        regression_trainer(tmp_path, model=model).train()


def test_batches_that_do_not_tell_their_targets_are_named(tmp_path: Path) -> None:
    trainer = regression_trainer(tmp_path)
    trainer.data_collator = lambda examples: {"x": torch.stack([x for x, _ in examples])}
    with pytest.raises(ValueError, match=r"returned \['x'\], but a loss needs labels, or num_targets"):
        trainer.train()


def test_datasets_without_a_length_are_named() -> None:
    args = TrainingArguments("out")
    with pytest.raises(TypeError, match="train_dataset is a generator, expected something with a length"):
        Trainer(Regression(), args, (pair for pair in pairs(3)))


# ---- GPTs in other clothes -------------------------------------------------------------------------------------------


class Probed(GPT):
    """A subclass with another __init__ and a module of its own."""

    def __init__(self, width: int, *, probe: bool) -> None:
        super().__init__(GPTConfig(vocab_size=32, n_positions=8, n_embd=width, n_layer=1, n_head=2))
        self.probe = nn.Linear(width, 1) if probe else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        assert self.probe is not None
        return output._replace(loss=output.loss + self.probe.weight.square().mean() + self.probe.bias.square().mean())


def subclass() -> nn.Module:
    torch.manual_seed(1)
    return Probed(16, probe=True)


def added() -> nn.Module:
    model = tiny_model(n_layer=1)
    model.register_module("extra", nn.Linear(16, 2))
    model.register_forward_hook(
        lambda module, args, output: output._replace(loss=output.loss + module.extra.weight.square().mean())
    )
    return model


def compiled() -> nn.Module:
    return torch.compile(tiny_model(n_layer=1), backend="eager")  # type: ignore[return-value]


def compiled_inside() -> nn.Module:
    model = tiny_model(n_layer=1)
    model.h[0].mlp = torch.compile(model.h[0].mlp, backend="eager")  # type: ignore[assignment]
    return model


@pytest.mark.filterwarnings("ignore:.*has no state for 1 trained parameters .extra.bias")
@pytest.mark.parametrize("make", [subclass, added, compiled, compiled_inside], ids=lambda make: make.__name__)
def test_gpts_of_every_make_resume_under_their_own_names(tmp_path: Path, make: Any) -> None:
    whole = tiny_trainer(tmp_path / "whole", model=make(), max_steps=4)
    whole.train()
    folder = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="power cut"):
        tiny_trainer(folder, [PowerCut(3)], make(), max_steps=4, save_steps=2).train()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert not [key for key in load_tensors(folder / "checkpoint-2" / name) if "_orig_mod" in key]
    resumed = tiny_trainer(folder, model=make(), max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    resumed.save_model()
    assert len(load_tensors(folder / "model.safetensors")) == len(whole.own_model.state_dict())


@pytest.mark.slow
def test_a_run_goes_on_compiled_or_not(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, model=compiled(), max_steps=2, save_steps=2, lr_scheduler_type="constant").train()
    resumed = tiny_trainer(tmp_path, model=tiny_model(n_layer=1), max_steps=3, lr_scheduler_type="constant")
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    assert set(GPT.from_pretrained(tmp_path / "checkpoint-2").state_dict()) == set(resumed.model.state_dict())


class Hidden(Regression):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name != "outer.bias"}


class Stateful(Regression):
    def get_extra_state(self) -> Any:
        return {"count": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "message"), [(Hidden, "outer.bias is a parameter"), (Stateful, "_extra_state is a dict; .* tensors only")]
)
def test_models_that_cannot_be_restored_are_refused_before_the_first_step(
    tmp_path: Path, model: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        regression_trainer(tmp_path / "out", model=model()).train()
    assert not (tmp_path / "out").exists()


# ---- the device ------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @torch.no_grad()  # autograd needs a GPU that is one
    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        self.weight.grad = x.mean(0)
        return SimpleNamespace(loss=(x @ self.weight - labels).square().mean())


def test_the_device_is_read_only_where_something_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors on a GPU raise if the loop, the model or the optimizer synchronises."""
    reads: list[int] = []
    monkeypatch.setattr(UnreadSteps, "read", lambda self: (reads.append(len(self.steps)), self.steps.clear())[1] or [])
    monkeypatch.setattr(torch.autograd, "backward", lambda loss: None)
    for part in ((Trainer, "_description"), (batches.Batches, "describe")):  # hash data, on the CPU
        monkeypatch.setattr(*part, lambda *_: {})
    monkeypatch.setattr(batches, "own_randomness", lambda seed: contextlib.nullcontext())  # keeps generators' state
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # needs a real GPU
    with FakeTensorMode(), ops.use("torch"):
        for dtype in (torch.float32, torch.bfloat16):
            model = Affine(torch.empty(3, dtype=dtype, device="cuda"))
            args: Any = {"max_steps": 10, "logging_steps": 4, "save_steps": 0, "disable_tqdm": True}
            data = [(torch.zeros(3, dtype=dtype), torch.zeros((), dtype=dtype))] * 16
            arguments = TrainingArguments(str(tmp_path / str(dtype)), **args)
            trainer = Trainer(model, arguments, data, None, lambda rows: stack(rows) | {"num_targets": len(rows)})
            assert trainer.device.type == "cuda"
            trainer.train()
    assert reads == [4, 4, 2] * 2
    monkeypatch.undo()
    unread = UnreadSteps(torch.device("cpu"))
    assert unread.due()
    unread.at_once = False
    unread.steps = [None] * 99  # type: ignore[list-item]
    assert not unread.due()
    unread.steps += [None]  # type: ignore[list-item]
    assert unread.due()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_bad_step_that_is_read_late_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    class Bad(TrainerCallback):
        def on_train_begin(self, trainer: Trainer) -> None:
            trainer.unread.at_once = False
            bias = trainer.model.h[0].attn.c_proj.bias
            bias.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step == 3 else 1.0))

    clean = tiny_trainer(tmp_path / "clean", max_steps=9, logging_steps=3, callbacks=[PowerCut(3)])
    late = tiny_trainer(tmp_path / "late", [Bad()], max_steps=9, logging_steps=3)
    with ops.use(backend):
        with pytest.raises(RuntimeError, match="power cut"):
            clean.train()
        with pytest.raises(NonFiniteError, match=r"step 4: .*The weights are those of step 3") as caught:
            late.train()
    assert (caught.value.step, late.state.global_step) == (4, 3)
    assert same(weights(late.model), weights(clean.model))
    for p, q in zip(late.model.parameters(), clean.model.parameters(), strict=True):
        assert same(late.optimizer.state[p], clean.optimizer.state[q])
    assert losses(tmp_path / "late") == [entry for entry in losses(tmp_path / "late") if entry["step"] == 3]


def test_results_read_late_are_the_same(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_train_begin(self, trainer: Trainer) -> None:
            trainer.unread.at_once = False

    outputs = [tiny_trainer(tmp_path / str(len(late)), late, logging_steps=4).train() for late in ([], [Late()])]
    assert outputs[0].training_loss == outputs[1].training_loss
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_skips_an_update_on_the_device(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.arange(4.0).to(dtype))
    optimizer = AdamW([parameter], lr=0.1, backend="torch")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    values = optimizer.state[parameter]
    masters = [values["master"]] if "master" in values else []
    for found_inf in (1.0, 0.0):  # as step would on a GPU; on the CPU it reads the flag itself
        with torch.no_grad():
            optim._adamw_torch(optim.Update(
                [parameter], masters, [parameter.grad * (math.nan if found_inf else 1)], [values["exp_avg"]],
                [values["exp_avg_sq"]], [values["step"]], optimizer.param_groups[0], torch.tensor(0.5),
                torch.tensor(found_inf),
            ))  # fmt: skip
        after = [parameter.detach(), *optimizer.state[parameter].values()]
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [bool(found_inf)] * len(after)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert int(values["step"]) == 2
    assert isinstance(optimizer.grad_norm(), float)


def test_no_tensor_depends_on_the_default_dtype_or_device(tmp_path: Path) -> None:
    plain, other = tiny_trainer(tmp_path / "plain", eval_steps=3, save_steps=3), tiny_model()
    plain.data_collator = DataCollatorForLanguageModeling()
    plain.train()
    data, more = rows(22), rows(10, seed=9)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        args: Any = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 3}
        arguments = TrainingArguments(str(tmp_path / "other"), **args, eval_steps=3, logging_steps=1, disable_tqdm=True)
        trainer = Trainer(other, arguments, data, more)
        trainer.callbacks.append(PowerCut(5))
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.train()
        trainer.callbacks.clear()
        trainer.train(resume_from_checkpoint=True)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert losses(tmp_path / "other") == losses(tmp_path / "plain")
    assert same(weights(other), weights(plain.model))
