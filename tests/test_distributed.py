"""Several processes: the bits of one, faults that name the rank, and what torchrun starts anew. All over gloo."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import NEW, SETTINGS, STEPS, alone, check_same, command, kill, processes, run
from tiny_run import losses, tiny_trainer
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gptcore.cli import main
from gptcore.training import checkpoint, resume
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.distributed import Tree
from gptcore.training.trainer import Trainer

__all__ = ["alone", "command"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])  # 3: blocks of 2, 3 and 3 micro-batches, so subtrees of 1 and 2
def test_bits_are_those_of_one_process(tmp_path: Path, alone: Path, count: int) -> None:
    assert run(tmp_path / "run", count) == ([0] * count, [""] * count)
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_killed_and_resumed_by_fewer_processes(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    for count, victim, step in ((4, 2, 7), (2, 0, 13)):
        codes, errors = run(folder, count, functools.partial(kill, victim=victim, step=step), resume=count < 4)
        assert codes[victim] == -signal.SIGKILL
        assert [code for rank, code in enumerate(codes) if rank != victim] == [1] * (count - 1)
        named = [
            re.search(rf"ProcessGroupError: .*rank {victim} \(process \d+ on .* has ended", text) for text in errors
        ]
        assert sum(match is not None for match in named) == count - 1, errors
    assert run(folder, 1, resume=True)[0] == [0]
    check_same(folder, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_leaves_one_checkpoint(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    interrupt = functools.partial(kill, victim=1, step=7, number=signal.SIGINT)
    assert run(folder, 2, interrupt, save_steps=0)[0] == [77, 77]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-8"]
    assert run(folder, 2, resume=True)[0] == [0, 0]
    check_same(folder, alone)


def fill_disk(rank: int, trainer: Trainer) -> None:
    if rank == 0:

        def save(*args: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        checkpoint.save_tensors = save


def differ(rank: int, trainer: Trainer, what: str) -> None:
    if rank == 1 and what == "data":
        trainer.train_dataset = trainer.train_dataset.flip(0)
    elif rank == 1 and what == "code":
        resume.code_version = lambda: "another"
    elif what == "vocabulary":
        trainer.tokenizer = SimpleNamespace(fingerprint=f"vocabulary {rank}", save_pretrained=None)
    elif rank == 1:
        setattr(trainer.args, what, 0.5)


def fail(rank: int, trainer: Trainer) -> None:
    if rank == 1:
        trainer.model.register_forward_hook(lambda *_: 1 / 0)


@pytest.mark.parametrize(
    ("prepare", "messages"),
    [
        (fill_disk, ["CheckpointError: .*No space left", "rank 0 failed: CheckpointError: .*No space left"]),
        (functools.partial(differ, what="data"), ["fingerprint is .* on rank 1, but .* on rank 0"] * 2),
        (functools.partial(differ, what="code"), ["code is 'another' on rank 1, but '[0-9a-f]{16}' on rank 0"] * 2),
        (
            functools.partial(differ, what="vocabulary"),
            ["vocabulary is 'vocabulary 1' on rank 1, but 'vocabulary 0' on rank 0"] * 2,
        ),
        (functools.partial(differ, what="adam_beta1"), ["adam_beta1 is 0.5 on rank 1, but 0.9 on rank 0"] * 2),
        (fail, ["rank 1 .* has ended", "ZeroDivisionError"]),
    ],
    ids=["full disk", "data", "code", "vocabulary", "arguments", "exception"],
)
def test_faults_of_one_process_end_all(tmp_path: Path, prepare: Any, messages: list[str]) -> None:
    codes, errors = run(tmp_path / "run", 2, prepare)
    assert codes == [1, 1]
    for message, error in zip(messages, errors, strict=True):
        assert re.search(message, error), error
    assert not list_checkpoints(tmp_path / "run")


def test_all_reduce_gives_about_the_same(tmp_path: Path, alone: Path) -> None:
    assert run(tmp_path / "run", 2, gradient_reduction="all_reduce")[0] == [0, 0]
    pairs = list(zip(losses(tmp_path / "run"), losses(alone), strict=True))
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in pairs if "loss" in a)


def test_more_processes_than_micro_batches_are_refused(tmp_path: Path) -> None:
    codes, errors = run(tmp_path / "run", 2, gradient_accumulation_steps=1)
    assert codes == [1, 1]
    assert "is 1 micro-batches a step, but 2 processes share them; expected at least 2" in errors[1]
    assert not (tmp_path / "run").exists()


def test_blocks_of_any_size_are_joined_as_one_tree() -> None:
    def tree(start: int = 0) -> Tree[str]:
        return Tree("({}{})".format, start)

    def pushed(start: int, leaves: Sequence[str | None]) -> Tree[str]:
        found = tree(start)
        for leaf in leaves:
            found.push(leaf)
        return found

    assert pushed(0, "abcdefg").total() == "(((ab)(cd))((ef)g))"
    assert pushed(0, ["a", None, "c"]).total() == "(ac)"
    for count in range(1, 18):
        leaves = [chr(97 + i) for i in range(count)]
        for parts in range(1, count + 1):
            joined = tree()
            for part in range(parts):
                block = range(part * count // parts, (part + 1) * count // parts)
                for _, size, value in pushed(block.start, leaves[block.start : block.stop]).nodes:
                    joined.push(value, size)
            assert joined.total() == pushed(0, leaves).total()


def train_until_killed(folder: Path, kills: int) -> None:
    """Train as one of two processes; in each of the first `kills` starts one is killed at a random moment."""
    torch.set_num_threads(1)
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    Path(f"{folder}.{attempt}.{rank}").touch()
    rng = random.Random(attempt)
    killed, seconds = rng.randrange(2) == rank, rng.uniform(0, 0.6)
    moment = time.monotonic() + seconds

    class Wait(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            if attempt < kills and trainer.state.global_step == STEPS - 1:
                time.sleep(60 if killed else max(0.0, moment - time.monotonic()))

    if attempt < kills and killed:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    tiny_trainer(folder, (Wait(),), **SETTINGS).train()


def launch(folder: Path, kills: int) -> None:
    """Do what torchrun does, with a function in place of a program."""
    place: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": folder.name}
    config = LaunchConfig(1, 1, 2, **place, max_restarts=kills, monitor_interval=0.05, start_method="forkserver")
    elastic_launch(config, train_until_killed)(folder, kills)


def check_kills(folder: Path, alone: Path, kills: int) -> None:
    """Kill one of two processes at a random moment, so many times; the launcher starts them anew each time."""
    launcher = processes.Process(target=launch, args=(folder, kills))
    launcher.start()
    launcher.join(500)
    assert launcher.exitcode == 0
    started = sorted(path.name for path in folder.parent.glob(f"{folder.name}.*"))
    assert started == [f"{folder.name}.{attempt}.{rank}" for attempt in range(kills + 1) for rank in range(2)]
    check_same(folder, alone)


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_anew(tmp_path: Path, alone: Path) -> None:
    """It ends with the weights of an undisturbed run; tests/sweep/kills.py is the same with ten kills."""
    check_kills(tmp_path / "run", alone, kills=2)


def test_the_command_line_resumes_only_its_own_launch(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*command, *NEW, "--output-dir", str(tmp_path / "out")]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    assert main(command) == 1
    assert "holds an earlier run (checkpoint-2)" in capsys.readouterr().err
