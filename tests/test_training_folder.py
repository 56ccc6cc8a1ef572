"""Files that a run writes, contents of its folder at the start, and when it can be resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import losses, rows, tiny_model, tiny_trainer
from torch.utils.data import Subset

from gptcore import ops
from gptcore.training import checkpoint
from gptcore.training.batches import _epoch_order
from gptcore.training.callbacks import TrainerCallback, read_log
from gptcore.training.checkpoint import CheckpointError, list_checkpoints
from gptcore.training.signals import TrainingInterrupted
from gptcore.training.trainer import Trainer

# ---- the folder and the log ------------------------------------------------------------------------------------------


def test_output_dir_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    tiny_trainer(tmp_path, save_steps=3).train()
    with pytest.raises(FileExistsError, match=r"checkpoint-3, checkpoint-6, log.jsonl.*overwrite_output_dir=True"):
        tiny_trainer(tmp_path, save_steps=3).train()
    tiny_trainer(tmp_path, save_steps=4, overwrite_output_dir=True, max_steps=4).train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-best", "log.jsonl", "notes.txt", "run.json"]
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
            labels = sum(trainer.count_targets(batch) for batch in trainer.batches.of(trainer.state.global_step - 1))
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


# ---- before the first step -------------------------------------------------------------------------------------------


class FakeTokenizer:
    def __init__(self, text: str = "{}", error: Exception | None = None) -> None:
        self.text, self.error = text, error

    def save_pretrained(self, folder: Path) -> None:
        if self.error is not None:
            raise self.error
        (Path(folder) / "tokenizer.json").write_text(self.text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trainer_with(folder: Path, tokenizer: Any, **changes: Any) -> Trainer:
    trainer = tiny_trainer(folder, **changes)
    trainer.tokenizer = tokenizer
    return trainer


def test_a_refused_run_changes_nothing(tmp_path: Path) -> None:
    first = trainer_with(tmp_path, FakeTokenizer("first"), save_steps=3)
    first.train()
    first.save_model()
    before = files(tmp_path)
    assert before["tokenizer.json"] == before["checkpoint-6/tokenizer.json"] == b"first"
    other: Any = {"warmup_steps": 6, "overwrite_output_dir": True}
    with pytest.raises(ValueError, match="warmup_steps is 6"):
        trainer_with(tmp_path, FakeTokenizer("second"), **other).train()
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        trainer_with(tmp_path, FakeTokenizer("second")).train()
    with pytest.raises(CheckpointError, match="seed 42 -> 1"):
        trainer_with(tmp_path, FakeTokenizer("second"), seed=1).train(resume_from_checkpoint=True)
    with checkpoint.exclusive(tmp_path), pytest.raises(CheckpointError, match="another process is training into"):
        trainer_with(tmp_path, FakeTokenizer("second"), overwrite_output_dir=True).train()
    broken = FakeTokenizer(error=RuntimeError("no vocabulary"))
    with pytest.raises(CheckpointError, match=r"FakeTokenizer cannot be saved in .*: no vocabulary"):
        trainer_with(tmp_path, broken, overwrite_output_dir=True).train()
    assert files(tmp_path) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    second = trainer_with(tmp_path, FakeTokenizer("second"), overwrite_output_dir=True, max_steps=1)
    second.train()
    assert {name: files(tmp_path)[name] for name in ("model.safetensors", "tokenizer.json")} == {
        name: before[name] for name in ("model.safetensors", "tokenizer.json")
    }  # one goes with the other, until save_model replaces both
    second.save_model()
    assert files(tmp_path)["tokenizer.json"] == b"second"


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no folder checkpoint-<step>"):
        tiny_trainer(tmp_path / "new").train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        trainer_with(tmp_path / "new", FakeTokenizer(error=OSError("no"))).train()
    assert not (tmp_path / "new").exists()


def test_tokenizers_that_cannot_be_saved_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="tokenizer is a object without save_pretrained"):
        trainer_with(tmp_path / "out", object()).train()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_that_holds_a_model_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds a model .{name}.; delete it with overwrite_output_dir=True"):
        tiny_trainer(tmp_path).train()
    assert files(tmp_path) == {name: b"mine"}
    assert tiny_trainer(tmp_path, overwrite_output_dir=True).train().global_step == 6


def test_room_for_a_checkpoint_is_checked_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path / "measure", max_steps=1, save_steps=1)
    trainer.train()
    tensors = sum(path.stat().st_size for path in (tmp_path / "measure" / "checkpoint-1").glob("*.safetensors"))
    needed = 3 * 4 * trainer.model.num_parameters()
    assert needed < tensors < 2 * needed  # headers are large beside so small a model
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(CheckpointError, match=f"a checkpoint takes {needed:,} bytes, but only {needed - 1:,} are free"):
        tiny_trainer(tmp_path / "out", save_steps=3).train()
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="if training is interrupted, it cannot be saved"):
        tiny_trainer(tmp_path / "out").train()


def test_a_checkpoint_of_another_run_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    a, b, new = tmp_path / "a", tmp_path / "b", tmp_path / "new"
    tiny_trainer(a, save_steps=2).train()
    tiny_trainer(b, save_steps=3).train()
    before = files(b)
    with pytest.raises(FileExistsError, match=r"b holds an earlier run .*a.checkpoint-2 is not one of its checkpoints"):
        tiny_trainer(b).train(resume_from_checkpoint=a / "checkpoint-2")
    assert files(b) == before
    tiny_trainer(new).train(resume_from_checkpoint=a / "checkpoint-2")
    tiny_trainer(b, overwrite_output_dir=True).train(resume_from_checkpoint=a / "checkpoint-2")
    assert losses(b) == losses(new) == losses(a)[2:]
    assert list_checkpoints(b) == []


def test_paths_are_those_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            os.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    trainer = tiny_trainer(Path("out"), [Elsewhere()], save_steps=3)
    trainer.train()
    trainer.save_model()
    assert sorted(os.listdir(tmp_path / "out")) == [
        "checkpoint-3", "checkpoint-6", "config.json", "log.jsonl", "model.safetensors", "run.json",
    ]  # fmt: skip
    assert os.listdir(tmp_path / "elsewhere") == []
    tiny_trainer(Path("~/run"), save_steps=3, max_steps=3, lr_scheduler_type="constant").train()
    tiny_trainer(tmp_path / "more", lr_scheduler_type="constant").train(resume_from_checkpoint="~/run/checkpoint-3")
    assert list_checkpoints(tmp_path / "home" / "run") == [tmp_path / "home" / "run" / "checkpoint-3"]


# ---- data ------------------------------------------------------------------------------------------------------------


class Listed:
    """A dataset with a fingerprint."""

    def __init__(self, examples: list[torch.Tensor], fingerprint: str) -> None:
        self.examples, self.fingerprint = examples, fingerprint

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.examples[i]


def changed_at(data: list[torch.Tensor], *indices: int) -> list[torch.Tensor]:
    return [31 - row if i in indices else row for i, row in enumerate(data)]


def resume_with(folder: Path, data: Any, other: Any) -> None:
    tiny_trainer(folder, data=data, save_steps=1, max_steps=1, lr_scheduler_type="constant").train()
    tiny_trainer(folder, data=other, max_steps=2, lr_scheduler_type="constant").train(resume_from_checkpoint=True)


def test_changed_data_is_noticed_wherever_it_changed(tmp_path: Path) -> None:
    for i, data in enumerate([rows(22), rows(200)]):
        trainer = tiny_trainer(tmp_path, data=data)
        seen = set(_epoch_order(len(data), 42, 0)[:4].tolist())
        unseen = next(j for j in range(len(data) - 1, 0, -1) if j not in seen)  # 21, and 199, the last
        assert trainer.batches.of(0)
        with pytest.raises(CheckpointError, match="fingerprint"):
            resume_with(tmp_path / str(i), data, changed_at(data, unseen))
    with pytest.warns(UserWarning, match="has no attribute `fingerprint`: 64 of its 200 examples are those of"):
        resume_with(tmp_path / "sampled", rows(200), rows(200))


def test_a_fingerprint_of_the_dataset_decides(tmp_path: Path) -> None:
    data = rows(200)
    with pytest.raises(CheckpointError, match="fingerprint 'one' -> 'two'"):
        resume_with(tmp_path / "a", Listed(data, "one"), Listed(data, "two"))
    with pytest.raises(CheckpointError, match="fingerprint"):
        resume_with(tmp_path / "b", Subset(Listed(data, "one"), range(100)), Subset(Listed(data, "one"), range(1, 101)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume_with(tmp_path / "c", Subset(Listed(data, "one"), range(100)), Subset(Listed(data, "one"), range(100)))


def test_checkpoints_from_before_fingerprints_resume(half: Path) -> None:
    edit_state(half / "checkpoint-3", lambda saved: saved["data"].pop("fingerprint"))
    edit_state(half / "checkpoint-3", lambda saved: saved["state"].pop("skipped_steps"))
    tiny_trainer(half, lr_scheduler_type="constant").train(resume_from_checkpoint=True)


def test_data_with_randomness_of_its_own_is_named_at_the_first_save(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    class Noisy(Listed):
        def __getitem__(self, i: int) -> torch.Tensor:
            return self.examples[i].roll(int(torch.randint(2, (), generator=generator)))

    data = [torch.arange(i, i + 8) for i in range(22)]
    with pytest.warns(UserWarning, match=r"different batches for the same indices.* cannot be resumed") as caught:
        tiny_trainer(tmp_path / "own", data=Noisy(data, "x"), save_steps=2).train()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_trainer(tmp_path / "none", data=data, save_steps=2).train()


def test_parameters_that_were_frozen_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.wpe.weight.requires_grad_(False)  # type: ignore[union-attr]
    tiny_trainer(tmp_path, model=model, save_steps=2, max_steps=2, lr_scheduler_type="constant").train()
    with pytest.warns(UserWarning, match=r"no state for 1 trained parameters \(wpe.weight\)"):
        tiny_trainer(tmp_path, lr_scheduler_type="constant").train(resume_from_checkpoint=True)


# ---- files that were edited, damaged or deleted ----------------------------------------------------------------------


def edit_state(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change trainer_state.json, and the manifest with it."""
    file = path / "trainer_state.json"
    saved = json.loads(file.read_text())
    edit(saved)
    file.write_text(json.dumps(saved))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[file.name] = checkpoint._fingerprint(file)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda saved: saved.pop("args"), "has no 'args'"),
        (lambda saved: saved.update(state=[]), "'state' should be"),
        (lambda saved: saved.update(data=None), "'data' should be"),
        (lambda saved: saved["state"].pop("epoch"), "has no 'epoch'"),
        (lambda saved: saved["state"].update(global_step="3"), "'global_step' should be of type int"),
        (lambda saved: saved["state"].update(global_step=2), "is of step 2, but the folder is checkpoint-3"),
        (lambda saved: saved["state"]["total"].update(loss=None), "'loss' should be of type float"),
        (lambda saved: saved["state"].update(more=1), "has 'more', which is not known"),
    ],
)
def test_an_edited_state_is_named(half: Path, edit: Any, message: str) -> None:
    edit_state(half / "checkpoint-3", edit)
    with pytest.raises(CheckpointError, match=f"checkpoint-3.*damaged.*{message}"):
        tiny_trainer(half, lr_scheduler_type="constant").train(resume_from_checkpoint=True)


def test_damaged_lines_of_the_log_do_not_block_resuming(half: Path) -> None:
    log = half / "log.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first, "{}\n", "null\n", "\0\0\0\n", '{"step": "2"}\n', *rest]))
    with pytest.raises(ValueError, match="line 2 has no 'step'"):
        read_log(log)
    with pytest.warns(UserWarning, match="the line is left out"):
        tiny_trainer(half, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in read_log(log)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["log", "folder"])
def test_what_is_deleted_during_a_run_is_named(tmp_path: Path, what: str) -> None:
    class Delete(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.global_step == 3:
                (tmp_path / "out" / "log.jsonl").unlink()
                if what == "folder":
                    shutil.rmtree(tmp_path / "out")

    with pytest.warns(UserWarning, match="log.jsonl was deleted or replaced .*: lines before step 3 are lost"):
        tiny_trainer(tmp_path / "out", [Delete()], save_steps=6).train()
    assert [entry["step"] for entry in losses(tmp_path / "out")] == [3, 4, 5, 6]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-6"]


# ---- signals at the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["on_save", "on_train_end"])
@pytest.mark.parametrize("save_steps", [3, 0])
def test_a_signal_at_the_very_end_is_answered(tmp_path: Path, when: str, save_steps: int) -> None:
    class Signal(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if name == when:
                return lambda trainer, *details: trainer.state.global_step == 6 and os.kill(os.getpid(), signal.SIGTERM)
            return super().__getattribute__(name)

    trainer = tiny_trainer(tmp_path, [Signal()], save_steps=save_steps)
    if when == "on_save" and save_steps == 0:
        assert trainer.train().global_step == 6  # nothing is saved
        return
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.train()
    assert caught.value.checkpoint == tmp_path / "checkpoint-6"
    checkpoint.verify_checkpoint(caught.value.checkpoint)
