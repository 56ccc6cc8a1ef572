"""Several processes of a tiny run over gloo, for tests of data parallel and sharded training."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import unsynced  # noqa: F401  (in the processes, too)
from tiny_run import exact, losses, tiny_trainer

from gptcore.cli import main
from gptcore.tensor_file import load_tensors
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.signals import TrainingInterrupted
from gptcore.training.trainer import Trainer

# A server that has imported PyTorch forks each process in milliseconds; it never computes, so has no threads to lose.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["gptcore.cli", "torch._dynamo", "torch.distributed.fsdp", "pytest", "hypothesis.strategies"]
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
    if changes.get("torch_compile"):
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
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


def work_printing(output: Path, function: Callable[..., object], arguments: Sequence[object]) -> None:
    torch.set_num_threads(1)
    with open(output, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.exit(function(*arguments))  # type: ignore[arg-type]


def start_printing(output: Path, function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a function, without the seconds that imports take; what it prints goes into a file."""
    member = processes.Process(target=work_printing, args=(output, function, arguments))
    member.start()
    return member


def run_command(argv: Sequence[str], prepare: Callable[[], object] | None) -> int:
    if prepare is not None:
        prepare()
    return main(argv)


def start_command(argv: Sequence[object], output: Path, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """Start `gptcore`."""
    return start_printing(output, run_command, [str(word) for word in argv], prepare)


def run_program(program: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a program in a folder, where each warning is an error."""
    os.environ.update(environment)
    os.chdir(folder)
    warnings.simplefilter("error")
    exec(program, {"__name__": "__main__"})


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one process, the same for all modules that import this."""
    folder = tmp_path_factory.getbasetemp() / "alone" / "run"
    if not folder.exists():
        folder.parent.mkdir()
        assert run(folder, 1)[0] == [0]
    return folder


def check_same(folder: Path, other: Path) -> None:
    assert exact(folder / f"checkpoint-{STEPS}") == exact(other / f"checkpoint-{STEPS}")
    assert losses(folder) == losses(other)


class Kill(TrainerCallback):
    def __init__(self, step: int, number: int = signal.SIGKILL) -> None:
        self.step, self.number = step, number

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def kill(rank: int, trainer: Trainer, victim: int, step: int, number: int = signal.SIGKILL) -> None:
    if rank == victim:
        trainer.callbacks.append(Kill(step, number))


def tensors(folder: Path) -> dict[str, Any]:
    """Return dtype, shape and values of all tensors of a checkpoint."""
    names = ("model.safetensors", "optimizer.safetensors")
    return {f"{name} {key}": value for name in names for key, value in load_tensors(folder / name).items()}


def check_close(folder: Path, other: Path, rel: float) -> None:
    """Compare two runs: the same files, tensors of the same names, shapes and dtypes, and losses about the same."""
    mine, theirs = list_checkpoints(folder)[-1], list_checkpoints(other)[-1]
    assert mine.name == theirs.name
    assert sorted(path.name for path in mine.iterdir()) == sorted(path.name for path in theirs.iterdir())
    found, expected = tensors(mine), tensors(theirs)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    pairs = list(zip(losses(folder), losses(other), strict=True))
    for key in ("loss", "eval_loss", "grad_norm"):
        assert all(a[key] == pytest.approx(b[key], rel=rel) for a, b in pairs if key in b)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command that trains a tiny model in two steps, but for its output folder."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(300)))
    options = "--max-steps 2 --samples 0 --warmup-steps 0 --eval-steps none --threads 1 --disable-tqdm --device cpu"
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    return ["train", str(text), *options.split()]


NEW = ["--n-embd", "16", "--n-layer", "1", "--n-head", "2", "--n-positions", "16", "--tokenizer-kind", "char"]
