"""Several processes: the bits of one, faults that name the rank, and what torchrun starts anew. All over gloo."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_run import exact, losses, tiny_trainer

from gptcore.cli import main
from gptcore.tensor_file import load_tensors
from gptcore.training import checkpoint, resume
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.distributed import Tree
from gptcore.training.signals import TrainingInterrupted
from gptcore.training.trainer import Trainer

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["gptcore.training.trainer", "torch._dynamo", "torch.distributed.fsdp", "pytest", "hypothesis.strategies"]
)
STEPS = 20
# 44 examples: the last step of an epoch has 6 of 8 micro-batches, so of four processes one has none
SETTINGS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_steps": STEPS, "eval_steps": 5,
    "save_steps": 5, "per_device_eval_batch_size": 2,
}  # fmt: skip


def work(rank: int, count: int, folder: Path, name: str, prepare: Any, resume: bool, changes: dict[str, Any]) -> None:
    """Train as one of `count` processes; the traceback of an error goes into a file."""
    torch.set_num_threads(1)
    try:
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}.{name}", rank=rank, world_size=count)
        trainer = tiny_trainer(folder, **{**SETTINGS, **changes})
        if prepare is not None:
            prepare(rank, trainer)
        trainer.train(resume_from_checkpoint=resume)
    except TrainingInterrupted:
        os._exit(77)
    except BaseException:
        Path(f"{folder}.{name}.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def run(
    folder: Path,
    count: int,
    prepare: Callable[[int, Trainer], None] | None = None,
    resume: bool = False,
    **changes: Any,
) -> tuple[list[int | None], list[str]]:
    """Train in `count` processes; return their exit codes and errors by rank."""
    name = f"group{len(list(folder.parent.iterdir()))}"
    members = [
        processes.Process(target=work, args=(rank, count, folder, name, prepare, resume, changes))
        for rank in range(count)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
        if member.is_alive():
            member.kill()
    reports = [Path(f"{folder}.{name}.{rank}") for rank in range(count)]
    return [member.exitcode for member in members], [path.read_text() if path.exists() else "" for path in reports]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run(folder, 1)[0] == [0]
    return folder


def check_same(folder: Path, other: Path) -> None:
    assert exact(folder / f"checkpoint-{STEPS}") == exact(other / f"checkpoint-{STEPS}")
    assert losses(folder) == losses(other)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])  # 3: blocks of 2, 3 and 3 micro-batches, so subtrees of 1 and 2
def test_bits_are_those_of_one_process(tmp_path: Path, alone: Path, count: int) -> None:
    assert run(tmp_path / "run", count) == ([0] * count, [""] * count)
    check_same(tmp_path / "run", alone)


class Kill(TrainerCallback):
    def __init__(self, step: int, number: int = signal.SIGKILL) -> None:
        self.step, self.number = step, number

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def kill(rank: int, trainer: Trainer, victim: int, step: int, number: int = signal.SIGKILL) -> None:
    if rank == victim:
        trainer.callbacks.append(Kill(step, number))


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


def whole_tensors_one_by_one(rank: int, trainer: Trainer) -> None:
    """Fail if a process holds two whole tensors at a time, as it would to hold the whole model; kill rank 1 later."""
    from torch.distributed.tensor import DTensor

    gather, held = DTensor.full_tensor, []

    def full_tensor(self: DTensor) -> torch.Tensor:
        assert not any(reference() is not None for reference in held)
        found = gather(self)
        held.append(weakref.ref(found))
        return found

    DTensor.full_tensor = full_tensor
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    kill(rank, trainer, victim=1, step=7)


def tensors(folder: Path) -> dict[str, Any]:
    """Return dtype, shape and values of all tensors of a checkpoint."""
    names = ("model.safetensors", "optimizer.safetensors")
    return {f"{name} {key}": value for name in names for key, value in load_tensors(folder / name).items()}


def check_close(folder: Path, other: Path, rel: float) -> None:
    """Compare two runs: the same files, tensors of the same names, shapes and dtypes, and losses about the same."""
    mine, theirs = folder / f"checkpoint-{STEPS}", other / f"checkpoint-{STEPS}"
    assert sorted(path.name for path in mine.iterdir()) == sorted(path.name for path in theirs.iterdir())
    found, expected = tensors(mine), tensors(theirs)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    pairs = list(zip(losses(folder), losses(other), strict=True))
    for key in ("loss", "eval_loss", "grad_norm"):
        assert all(a[key] == pytest.approx(b[key], rel=rel) for a, b in pairs if key in b)


def test_fsdp_is_killed_and_one_process_resumes(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    codes, errors = run(folder, 2, whole_tensors_one_by_one, parallel="fsdp")
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"ProcessGroupError: .*rank 1 \(process \d+ on .* has ended", errors[0]), errors[0]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5"]
    assert run(folder, 1, resume=True) == ([0], [""])
    check_close(folder, alone, rel=1e-4)


@pytest.mark.parametrize(("bf16", "rel"), [(False, 1e-4), (True, 0.05)])
def test_fsdp_resumes_what_one_process_began(tmp_path: Path, alone: Path, bf16: bool, rel: float) -> None:
    """Mixed precision by FSDP's policy is bfloat16 for weights and activations, and float32 for sums of gradients."""
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    for path in list_checkpoints(folder)[2:]:
        shutil.rmtree(path)
    assert run(folder, 2, resume=True, parallel="fsdp", bf16=bf16) == ([0, 0], ["", ""])
    check_close(folder, alone, rel)


def test_fsdp_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parallel is 'fsdp', but there is 1 process; start several with torchrun"):
        tiny_trainer(tmp_path / "run", parallel="fsdp")


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
        for processes in range(1, count + 1):
            joined = tree()
            for rank in range(processes):
                block = range(rank * count // processes, (rank + 1) * count // processes)
                for _, size, value in pushed(block.start, leaves[block.start : block.stop]).nodes:
                    joined.push(value, size)
            assert joined.total() == pushed(0, leaves).total()


SCRIPT = """
import os, random, signal, sys, threading, time, torch
from tiny_run import tiny_trainer
from test_distributed import SETTINGS, STEPS
from gptcore.training.callbacks import TrainerCallback

class Wait(TrainerCallback):
    def on_step_end(self, trainer):
        if attempt < kills and trainer.state.global_step == STEPS - 1:
            time.sleep(max(0.0, moment - time.monotonic()) + 0.5)

kills, attempt = int(sys.argv[2]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
random.seed(attempt)
victim, moment = random.randrange(2), time.monotonic() + random.uniform(0, 1.5)
if attempt < kills and int(os.environ["RANK"]) == victim:
    threading.Timer(moment - time.monotonic(), os.kill, (os.getpid(), signal.SIGKILL)).start()
torch.set_num_threads(1)
tiny_trainer(sys.argv[1], (Wait(),), **SETTINGS).train()
"""


def check_kills(folder: Path, alone: Path, kills: int) -> None:
    """Kill one of two processes at a random moment, so many times; torchrun starts them anew each time."""
    folder.with_suffix(".py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {kills} --monitor-interval 0.1"
    done = subprocess.run(
        [sys.executable, *torchrun.split(), str(folder.with_suffix(".py")), str(folder), str(kills)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9") == kills
    check_same(folder, alone)


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_anew(tmp_path: Path, alone: Path) -> None:
    """It ends with the weights of an undisturbed run; tests/sweep/kills.py is the same with ten kills."""
    check_kills(tmp_path / "run", alone, kills=2)


def test_the_command_line_resumes_only_its_own_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(300)))
    options = "--n-embd 16 --n-layer 1 --n-head 2 --n-positions 16 --tokenizer-kind char --max-steps 2 --samples 0"
    options += " --warmup-steps 0 --eval-steps none --threads 1 --disable-tqdm"
    command = ["train", str(text), *options.split(), "--output-dir", str(tmp_path / "out")]
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    assert main(command) == 1
    assert "holds an earlier run (checkpoint-2)" in capsys.readouterr().err
