"""The training loop: its arguments, its arithmetic, what it leaves alone, and what it writes and says."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gptcore import ops
from gptcore.config import GPTConfig
from gptcore.model import GPT, GPTOutput
from gptcore.training.arguments import TrainingArguments, lr_at
from gptcore.training.callbacks import ProgressLine, TrainerCallback, read_log
from gptcore.training.checkpoint import CheckpointError, list_checkpoints
from gptcore.training.plan import flops_per_token
from gptcore.training.state import NonFiniteError
from gptcore.training.trainer import Trainer, make_optimizer

Batch = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for each other with models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def collate(rows: list[torch.Tensor]) -> Batch:
    """Rows of different lengths, padded on the right."""
    length = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (0, length - len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def rows(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(0, 32, (length,), generator=generator) for length in lengths]


def tiny_model(dropout: float = 0.1, **changes: Any) -> GPT:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT(GPTConfig(**(shape | drops | changes)))


def tiny_trainer(
    folder: Path, callbacks: Any = (), model: GPT | None = None, data: Any = None, **changes: Any
) -> Trainer:
    args: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 0}
    args |= {"logging_steps": 1, "disable_tqdm": True}
    data = rows(22) if data is None else data
    return Trainer(
        model or tiny_model(),
        TrainingArguments(str(folder), **args | changes),
        data,
        rows(10, seed=9),
        collate,
        callbacks=callbacks,
    )


def weights(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(folder / "log.jsonl")]


class Gradients(TrainerCallback):
    def on_step_end(self, trainer: Trainer) -> None:
        self.taken = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


# ---- arguments and schedule ------------------------------------------------------------------------------------------


def test_defaults_are_those_of_hugging_face() -> None:
    assert dataclasses.asdict(TrainingArguments("out")) == {
        "output_dir": "out", "overwrite_output_dir": False, "num_train_epochs": 3.0, "max_steps": -1,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "logging_steps": 500, "eval_steps": None,
        "save_steps": 500, "save_total_limit": None, "seed": 42, "bf16": False, "disable_tqdm": False,
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


def schedule(kind: Any, warmup: int, total: int) -> list[float]:
    args = TrainingArguments("out", learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup)
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


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 200), st.data())
def test_schedule_rises_then_falls_and_is_never_zero(kind: str, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    lrs = schedule(kind, warmup, total)
    assert all(0 < lr <= 1 for lr in lrs)
    assert lrs[warmup] == 1
    assert lrs[: warmup + 1] == sorted(lrs[: warmup + 1])
    assert lrs[warmup:] == sorted(lrs[warmup:], reverse=True)


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
        batches = [trainer._micro_batches(3 * epoch + step) for step in range(3)]
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


# ---- the folder and the log ------------------------------------------------------------------------------------------


def test_output_dir_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    tiny_trainer(tmp_path, save_steps=3).train()
    with pytest.raises(FileExistsError, match=r"checkpoint-3, checkpoint-6, log.jsonl.*overwrite_output_dir=True"):
        tiny_trainer(tmp_path, save_steps=3).train()
    tiny_trainer(tmp_path, save_steps=4, overwrite_output_dir=True, max_steps=4).train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-best", "log.jsonl", "notes.txt"]
    assert [entry["step"] for entry in losses(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / "checkpoint-2").mkdir()  # of another program
    with pytest.raises(FileExistsError, match=r"checkpoint-2 has no manifest.json"):
        tiny_trainer(tmp_path, overwrite_output_dir=True).train()


def test_log_has_each_step_once_after_resuming(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tiny_trainer(whole, eval_steps=2, logging_steps=3, max_steps=11).train()
    assert [entry["step"] for entry in losses(whole)] == [2, 3, 4, 6, 8, 9, 10, 11]
    assert ["loss" in entry for entry in losses(whole)] == [False, True, False, True, False, True, False, True]

    class Stop(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.global_step == 8:
                raise RuntimeError("power cut")

    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="power cut"):
        tiny_trainer(parts, [Stop()], eval_steps=2, logging_steps=3, max_steps=11, save_steps=5).train()
    with open(parts / "log.jsonl", "a") as file:
        file.write('{"step": 8, "los')
    assert [entry["step"] for entry in losses(parts)] == [2, 3, 4, 6]
    tiny_trainer(parts, eval_steps=2, logging_steps=3, max_steps=11).train(resume_from_checkpoint=True)
    assert losses(parts) == losses(whole)
    (parts / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 is not JSON"):
        read_log(parts / "log.jsonl")


def test_logged_loss_is_the_mean_over_labels_since_the_last_line(tmp_path: Path) -> None:
    seen = []

    class Collect(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            labels = sum(
                trainer.count_targets(batch) for batch in trainer._micro_batches(trainer.state.global_step - 1)
            )
            seen.append((trainer.last_step["loss"], labels))

    output = tiny_trainer(tmp_path, [Collect()], logging_steps=4).train()
    means = [sum(x * n for x, n in part) / sum(n for _, n in part) for part in (seen[:4], seen[4:], seen)]
    assert [entry["loss"] for entry in losses(tmp_path)] == pytest.approx(means[:2])
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(means[2])
    assert output.global_step == 6
    assert output.metrics["tokens_per_second"] > 0
    assert output.metrics["epoch"] == 1.0


def test_not_finite_in_the_log_is_null(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1, eval_steps=1, save_steps=1)
    trainer.evaluate = lambda: {"eval_loss": math.nan, "perplexity": math.inf}  # type: ignore[method-assign]
    trainer.train()
    (entry,) = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert entry["eval_loss"] is entry["perplexity"] is None
    assert trainer.state.best_step is None


# ---- resuming with other arguments -----------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path) -> Path:
    tiny_trainer(tmp_path, save_steps=3, max_steps=3, lr_scheduler_type="constant").train()
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4 -> 2"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps 1 -> 3"),
        ({"seed": 7}, "seed 42 -> 7"),
        ({"data": rows(21)}, "examples 22 -> 21"),
        ({"data": rows(22, seed=5)}, "sha256 of the last batches"),
    ],
)
def test_other_data_position_is_an_error(half: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be resumed with other data or batches: .*{message}"):
        tiny_trainer(half, lr_scheduler_type="constant", **changes).train(resume_from_checkpoint=True)


def test_other_course_is_a_warning_with_every_difference(half: Path) -> None:
    model = tiny_model(dropout=0.2)
    with pytest.warns(UserWarning, match=r"learning_rate 0.01 -> 0.1; .*embd_pdrop 0.1 -> 0.2"), ops.use("torch"):
        tiny_trainer(half, model=model, learning_rate=0.1, lr_scheduler_type="constant").train(
            resume_from_checkpoint=True
        )


def test_longer_runs_and_other_cadences_are_free(half: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changes = {
            "logging_steps": 2,
            "eval_steps": 3,
            "save_steps": 2,
            "save_total_limit": 1,
            "lr_scheduler_type": "constant",
        }
        tiny_trainer(half, **changes).train(resume_from_checkpoint=True)
    assert [path.name for path in list_checkpoints(half)] == ["checkpoint-6"]


def test_longer_decay_is_a_warning(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, save_steps=3, max_steps=3).train()
    with pytest.warns(UserWarning, match="total_steps 3 -> 6"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert tiny_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True).global_step == 3  # nothing left to do


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
    (batch,) = trainer._micro_batches(0)
    assert sorted(batch["labels"].tolist()) == [[-100, 2, 3], [3, 1, -100]]
    assert trainer.count_targets(batch) == 3
    assert trainer.train().global_step == 1
