"""The training loop: its arguments, its arithmetic, what it leaves alone, and what it writes and says."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import Batch, collate, losses, rows, same, tiny_model, tiny_trainer, weights

from gptcore import ops
from gptcore.config import GPTConfig
from gptcore.model import GPT, GPTOutput
from gptcore.training.arguments import TrainingArguments
from gptcore.training.batches import _epoch_order
from gptcore.training.callbacks import ProgressLine, TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.plan import flops_per_token
from gptcore.training.signals import TrainingInterrupted
from gptcore.training.state import NonFiniteError
from gptcore.training.trainer import Trainer, make_optimizer


class Gradients(TrainerCallback):
    def on_step_end(self, trainer: Trainer) -> None:
        self.taken = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


# ---- the arithmetic of a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 12), (4, 3), (5, 3), (6, 2)])
def test_accumulation_equals_one_batch_with_unequal_lengths(tmp_path: Path, batch: int, accumulation: int) -> None:
    def gradients(batch: int, accumulation: int) -> tuple[float, dict[str, torch.Tensor]]:
        taken = Gradients()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        args = {"max_steps": 1, "max_grad_norm": 0.0, "overwrite_output_dir": True}
        output = tiny_trainer(tmp_path, [taken], tiny_model(dropout=0.0), rows(12), **sizes, **args).train()
        return output.training_loss, taken.taken

    (loss, whole), (other_loss, parts) = gradients(12, 1), gradients(batch, accumulation)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_labels_are_counted_as_the_model_counts_them(data: st.DataObject) -> None:
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    flags = st.lists(st.booleans(), min_size=B * T, max_size=B * T).map(lambda f: torch.tensor(f).view(B, T))
    ids = torch.arange(B * T).view(B, T) % 32
    batch = {"input_ids": ids, "labels": ids.masked_fill(data.draw(flags), -100)}
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    counted = batch["labels"] != -100
    kind = data.draw(st.sampled_from(["plain", "padded", "packed"]))
    if kind == "padded":
        lengths = torch.tensor(data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
        place = torch.arange(T).expand(B, T)
        left = data.draw(st.booleans())
        mask = place >= T - lengths[:, None] if left else place < lengths[:, None]
        batch["attention_mask"] = mask.long()
        first = mask & (mask.cumsum(1) == 1)
        counted &= mask
    elif kind == "packed":
        first |= data.draw(flags)
        batch["cu_seqlens"] = torch.tensor([*first.flatten().nonzero().flatten().tolist(), B * T])
    counted &= ~first
    assert tiny_model().count_targets(batch) == int(counted.sum())
    with torch.no_grad():
        output = tiny_model(dropout=0.0).eval()(**batch)
    expected = [
        F.cross_entropy(output.logits[b, t - 1], ids[b, t]).item() for b, t in counted.nonzero().tolist()
    ]  # each label against the logits before it
    assert output.loss.item() == pytest.approx(sum(expected) / max(1, len(expected)), rel=1e-5)


def test_matrices_decay_and_each_parameter_is_in_one_group_once() -> None:
    for tied in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        model.h[0].mlp.c_fc.weight.requires_grad_(False)
        matrices, vectors = make_optimizer(model, TrainingArguments("out", weight_decay=0.1)).param_groups
        assert matrices["weight_decay"] == 0.1
        assert vectors["weight_decay"] == 0.0
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, others = ([names[id(p)] for p in group["params"]] for group in (matrices, vectors))
        assert all(name.endswith("bias") or ".ln_" in name or "ln_f" in name for name in others)
        assert {"wte.weight", "wpe.weight", "h.1.attn.c_attn.weight"} <= set(decayed)
        assert ("lm_head.weight" in decayed) != tied
        assert sorted(decayed + others) == sorted(set(names.values()) - {"h.0.mlp.c_fc.weight"})


def test_gradients_are_clipped(tmp_path: Path) -> None:
    norms = []
    for limit in (0.0, 0.1):
        trainer = tiny_trainer(tmp_path, max_steps=1, max_grad_norm=limit, overwrite_output_dir=True)
        trainer.train()
        # after one step exp_avg is (1 - beta1) times the gradient that AdamW saw
        squares = [((m["exp_avg"] / (1 - 0.9)) ** 2).sum().item() for m in trainer.optimizer.state.values()]
        norms.append(math.sqrt(sum(squares)))
        assert losses(tmp_path)[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-4)  # before clipping, either time
    assert norms[0] > 0.11
    assert norms[1] == pytest.approx(0.1, rel=1e-3)


def test_steps_of_an_epoch_have_each_example_once(tmp_path: Path) -> None:
    data = [torch.tensor([i, i]) for i in range(22)]
    trainer = tiny_trainer(tmp_path, data=data, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=1.5)
    assert (trainer.steps_per_epoch, trainer.total_steps) == (3, 5)
    epochs = []
    for epoch in range(2):
        batches = [trainer.batches.of(3 * epoch + step) for step in range(3)]
        assert [[len(batch["labels"]) for batch in step] for step in batches] == [[4, 4], [4, 4], [4, 2]]
        epochs.append([i for step in batches for batch in step for i in batch["input_ids"][:, 0].tolist()])
        assert sorted(epochs[-1]) == list(range(22))
    assert epochs[0] != epochs[1]


def test_it_learns(tmp_path: Path) -> None:
    data = [torch.arange(i, i + 8) % 32 for i in range(32)]
    trainer = tiny_trainer(
        tmp_path, data=data, max_steps=80, eval_steps=None, warmup_steps=5, lr_scheduler_type="cosine"
    )
    trainer.train()
    log = losses(tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(32), rel=0.02)
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]


def test_bf16_keeps_float32_weights(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, bf16=True)
    seen = []
    trainer.model.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {m["exp_avg"].dtype for m in trainer.optimizer.state.values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"float32 weights, but the model has torch.bfloat16"):
        tiny_trainer(tmp_path / "other", model=tiny_model().bfloat16(), bf16=True).train()


@pytest.mark.slow
def test_bfloat16_weights_learn_as_float32_does_and_resume_bit_for_bit(tmp_path: Path) -> None:
    data = [torch.arange(i, i + 8) % 32 for i in range(32)]

    def trainer(dtype: torch.dtype) -> Trainer:
        settings: dict[str, Any] = {"max_steps": 120, "learning_rate": 3e-3, "save_steps": 60}
        return tiny_trainer(tmp_path / str(dtype), model=tiny_model(dropout=0.0).to(dtype), data=data, **settings)

    whole = trainer(torch.bfloat16)
    for trained in (whole, trainer(torch.float32)):
        trained.train()
    assert "bfloat16, as the model is (bf16=False); AdamW keeps the weights in float32 beside it" in whole.plan()
    narrow, wide = ([e["loss"] for e in losses(tmp_path / str(dtype))] for dtype in (torch.bfloat16, torch.float32))
    assert wide[-1] < 0.5 * wide[0]
    assert narrow == pytest.approx(wide, rel=3e-2)

    shutil.rmtree(tmp_path / "torch.bfloat16" / "checkpoint-120")
    resumed = trainer(torch.bfloat16)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert same(whole.optimizer.state[p], resumed.optimizer.state[q])
        assert resumed.optimizer.state[q]["master"].dtype == torch.float32


def test_cpu_and_torch_backends_train_alike(tmp_path: Path) -> None:
    curves = {}
    for name in ("cpu", "torch"):
        with ops.use(name):
            tiny_trainer(tmp_path / name, model=tiny_model(dropout=0.0), max_steps=50).train()
        curves[name] = [entry["loss"] for entry in losses(tmp_path / name)]
    assert len(curves["cpu"]) == 50
    assert curves["cpu"] == pytest.approx(curves["torch"], abs=1e-3)
    assert curves["cpu"] != curves["torch"], "both ran on the same backend"


# ---- what must not happen --------------------------------------------------------------------------------------------


def poison_gradient(trainer: Trainer) -> None:
    bad = trainer.model.h[1].attn.c_proj.weight
    bad.register_hook(lambda g: g * math.nan if trainer.state.global_step == 3 else g)


def poison_weight(trainer: Trainer) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.global_step == 3:
                with torch.no_grad():
                    trainer.model.h[0].ln_2.weight[5] = math.inf

    trainer.callbacks.insert(0, Poison())


def poison_loss(trainer: Trainer) -> None:
    def hook(module: GPT, inputs: Any, output: GPTOutput) -> GPTOutput | None:
        bad = trainer.state.global_step == 3 and output.loss is not None
        return output._replace(loss=output.loss * math.inf) if bad and output.loss is not None else None

    trainer.model.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("poison", "tensor"),
    [
        (poison_gradient, "gradient of h.1.attn.c_proj.weight"),
        (poison_weight, "parameter h.0.ln_2.weight"),
        (poison_loss, "loss"),
    ],
)
def test_non_finite_stops_before_the_update(tmp_path: Path, poison: Any, tensor: str) -> None:
    class Remember(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            self.weights = weights(trainer.model)
            self.moments = [m["exp_avg"].clone() for m in trainer.optimizer.state.values()]

    remember = Remember()
    trainer = tiny_trainer(tmp_path, [remember], save_steps=2, eval_steps=None)
    poison(trainer)
    with pytest.raises(
        NonFiniteError, match=f"step 4: .* the {tensor}.* step 3; the newest checkpoint is .*-2"
    ) as caught:
        trainer.train()
    assert (caught.value.step, caught.value.tensor) == (4, tensor)
    assert same(weights(trainer.model), remember.weights)
    assert all(map(torch.equal, remember.moments, [m["exp_avg"] for m in trainer.optimizer.state.values()]))

    resumed, clean = tiny_trainer(tmp_path, save_steps=2), tiny_trainer(tmp_path / "clean")
    resumed.train(resume_from_checkpoint=True)
    clean.train()
    assert same(weights(resumed.model), weights(clean.model))


def test_evaluation_leaves_no_trace_in_training(tmp_path: Path) -> None:
    def noisy(examples: list[torch.Tensor]) -> Batch:  # draws from every global generator
        random.random()
        torch.rand(1)
        return collate(examples)

    ends = []
    for eval_steps in (None, 1, 4):
        trainer = tiny_trainer(tmp_path, eval_steps=eval_steps, overwrite_output_dir=True)
        trainer.data_collator = noisy
        trainer.model.h[0].attn.resid_dropout.eval()  # a mode that is not the model's
        trainer.train()
        assert trainer.model.training
        assert not trainer.model.h[0].attn.resid_dropout.training
        ends.append((weights(trainer.model), [entry["loss"] for entry in losses(tmp_path) if "loss" in entry]))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][0], ends[2][0])
    assert ends[0][1] == ends[1][1] == ends[2][1]
    before = torch.get_rng_state(), random.getstate()
    assert trainer.evaluate() == trainer.evaluate()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_evaluation_is_a_mean_over_labels(tmp_path: Path) -> None:
    results = [tiny_trainer(tmp_path, per_device_eval_batch_size=size).evaluate() for size in (1, 3, 10)]
    model = tiny_model().eval()
    total, count = 0.0, 0
    for row in rows(10, seed=9):
        logits = model(row[None]).logits[0]
        total, count = total + F.cross_entropy(logits[:-1], row[1:], reduction="sum").item(), count + len(row) - 1
    for result in results:
        assert result["eval_loss"] == pytest.approx(total / count, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"warmup_steps": 6}, "warmup_steps is 6, but the run has only 6 steps"), ({"eval_steps": 2}, "no eval_dataset")],
)
def test_plans_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    trainer = tiny_trainer(tmp_path, **changes)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_data_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset holds 0 examples"):
        tiny_trainer(tmp_path, data=[])
    with pytest.raises(ValueError, match=r"step 1 has .* tokens, but not one label that counts"):
        tiny_trainer(tmp_path, data=[torch.tensor([1])] * 4).train()
    trainer = Trainer(tiny_model(), TrainingArguments(str(tmp_path)), None, None, collate)
    with pytest.raises(ValueError, match="needs a train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        trainer.evaluate()
    trainer = tiny_trainer(tmp_path / "other", data=[torch.arange(4)] * 4)
    trainer.data_collator = lambda examples: {"input_ids": torch.stack(examples)}
    with pytest.raises(ValueError, match=r"returned \['input_ids'\], but a loss needs labels"):
        trainer.train()


# ---- steps without a target ------------------------------------------------------------------------------------------


def test_steps_without_a_target_are_skipped_and_counted(tmp_path: Path) -> None:
    """A row of one token has no target. In an epoch of 6 steps of one row, two have none; resumed or not."""
    data = [torch.arange(i, i + (1 if i in (2, 5) else 4)) for i in range(6)]
    settings: Any = {"data": data, "per_device_train_batch_size": 1, "max_steps": 9, "logging_steps": 1}
    order = [int(i) for epoch in range(2) for i in _epoch_order(6, 42, epoch)][:9]
    skipped = [step for step, i in enumerate(order, start=1) if i in (2, 5)]
    updates: list[int] = []

    class Record(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            updates.append(trainer.state.global_step)

    whole = tiny_trainer(tmp_path / "whole", [Record()], **settings)
    whole.train()
    assert updates == [step for step in range(1, 10) if step not in skipped]
    log = losses(tmp_path / "whole")
    assert [entry["step"] for entry in log] == list(range(1, 10))
    assert [entry.get("skipped_steps", 0) for entry in log] == [
        sum(s <= step for s in skipped) for step in range(1, 10)
    ]
    assert all(math.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    assert {int(state["step"]) for state in whole.optimizer.state.values()} == {9 - len(skipped)}

    for step in skipped:
        folder = tmp_path / str(step)
        tiny_trainer(folder, **settings | {"max_steps": step}, save_steps=step, lr_scheduler_type="constant").train()
        resumed = tiny_trainer(folder, **settings, lr_scheduler_type="constant")
        resumed.train(resume_from_checkpoint=True)
        whole = tiny_trainer(tmp_path / f"{step} whole", **settings, lr_scheduler_type="constant")
        whole.train()
        assert same(weights(resumed.model), weights(whole.model))
        assert losses(folder) == losses(tmp_path / f"{step} whole")


def test_micro_batches_without_a_target_are_left_out(tmp_path: Path) -> None:
    """Their mean is 0 / 0 in models that take no care of it."""
    model = tiny_model(dropout=0.0)
    model.register_forward_hook(
        lambda module, args, kwargs, output: output._replace(
            loss=output.loss * (math.nan if model.count_targets(kwargs) == 0 else 1.0)
        ),
        with_kwargs=True,
    )
    data = [torch.arange(1), torch.arange(4), torch.arange(3), torch.arange(1)]
    sizes: Any = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    output = tiny_trainer(tmp_path / "a", model=model, data=data, **sizes).train()
    sizes = {"per_device_train_batch_size": 4, "max_steps": 1}
    whole = tiny_trainer(tmp_path / "b", model=tiny_model(dropout=0.0), data=data, **sizes).train()
    assert output.training_loss == pytest.approx(whole.training_loss, rel=1e-6)


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    events: list[str] = []

    class Record(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda trainer, *details: events.append(name.removeprefix("on_"))
            return super().__getattribute__(name)

    tiny_trainer(tmp_path, [Record()], max_steps=2, eval_steps=2, save_steps=2, logging_steps=2).train()
    assert events == ["train_begin", "step_end", "step_end", "evaluate", "log", "save", "train_end"]


def test_progress(tmp_path: Path) -> None:
    said = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        folder = tmp_path / str(terminal)
        steps = {"max_steps": 4, "logging_steps": 2, "eval_steps": 4, "save_steps": 4}
        tiny_trainer(folder, [ProgressLine(console)], data=[torch.arange(8)] * 16, **steps).train()
        said[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    for text in said.values():
        assert "7,232: 6,784 in matrices (weight decay 0), 448 in biases and norms" in text
        assert "FLOPs per token" in text
        assert "32 tokens each (4 x 1 x 8)" in text
        assert "eval_loss" in text
        assert "checkpoint-4" in text
    assert [line.split("  ")[0] for line in said[False].splitlines() if line.startswith("step ")] == [
        "step 2/4",
        "step 4/4",
    ]
    assert "left" in said[False]
    assert "step 4/4" in said[True]
    assert "tokens/s" in said[True]


class Broken(io.StringIO):
    """A stream that takes some characters, and then raises."""

    def __init__(self, error: Exception, after: int, terminal: bool) -> None:
        super().__init__()
        self.error, self.left, self.terminal = error, after, terminal

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left < 0:
            raise self.error
        return len(text)

    def fileno(self) -> int:  # for rich, which on a closed pipe replaces it by /dev/null and exits
        raise io.UnsupportedOperation("fileno")

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("after", [0, 1200])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(errno.EPIPE, "closed"), OSError(errno.ENOSPC, "full"), ValueError("closed file")],
    ids=lambda error: type(error).__name__,
)
def test_output_that_cannot_be_written_does_not_end_a_run(
    tmp_path: Path, error: Exception, after: int, terminal: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    console = Console(file=Broken(error, after, terminal), force_terminal=terminal, width=120)
    steps: Any = {"max_steps": 12, "logging_steps": 1, "eval_steps": 6, "save_steps": 6}
    trainer = tiny_trainer(tmp_path, [ProgressLine(console)], **steps)
    assert trainer.train().global_step == 12
    assert console.quiet
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-12"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_closed_stderr_does_not_keep_a_signal_from_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EBADF, "closed")

    class Signal(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.global_step == 3:
                monkeypatch.setattr(os, "write", closed)
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.undo()

    with pytest.raises(TrainingInterrupted) as caught:
        tiny_trainer(tmp_path, [Signal()]).train()
    assert caught.value.checkpoint.name == "checkpoint-3"


def test_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, disable_tqdm=True, save_steps=2, eval_steps=2).train()
    assert capfd.readouterr() == ("", "")


def test_flops_of_gpt2() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
        untied = GPT(GPTConfig(tie_word_embeddings=False))
    assert flops_per_token(model, 1024) * 1024 == 874_944_921_600  # nanoGPT's transformer_sizing.ipynb, matmuls only
    assert flops_per_token(untied, 1024) == flops_per_token(model, 1024)


def test_save_model(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    trainer.save_model(tmp_path / "elsewhere" / "deep")
    for folder in (tmp_path / "run", tmp_path / "elsewhere" / "deep"):
        assert same(weights(GPT.from_pretrained(folder)), weights(trainer.model))


def test_training_in_another_thread(tmp_path: Path) -> None:
    trainers = [tiny_trainer(tmp_path / "thread"), tiny_trainer(tmp_path / "main")]
    thread = threading.Thread(target=trainers[0].train)
    thread.start()
    thread.join()
    trainers[1].train()
    assert same(weights(trainers[0].model), weights(trainers[1].model))


def test_neither_collator_nor_tokenizer_is_needed(tmp_path: Path) -> None:
    """Rows of ids, or ids with labels of their own, of any length: what is padding follows from the lengths."""
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [3, 1], "labels": [3, 1]}]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=2, disable_tqdm=True)
    trainer = Trainer(tiny_model(), arguments, examples)
    (batch,) = trainer.batches.of(0)
    assert sorted(batch["labels"].tolist()) == [[-100, 2, 3], [3, 1, -100]]
    assert trainer.count_targets(batch) == 3
    assert trainer.train().global_step == 1
