"""Several processes: the bits of one, faults that name the rank, and what torchrun starts anew. All over gloo."""

from __future__ import annotations

import errno
import functools
import math
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
from tiny_run import exact, losses, tiny_gpt, tiny_trainer

from gptcore import GPT, GPTConfig
from gptcore.cli import main
from gptcore.lora import add_adapter
from gptcore.tensor_file import load_tensors
from gptcore.training import checkpoint, resume
from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.distributed import Tree
from gptcore.training.sharding import sharded_model
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


def test_fsdp_is_killed_and_one_process_resumes(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    codes, errors = run(folder, 2, whole_tensors_one_by_one, parallel="fsdp")
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"ProcessGroupError: .*rank 1 \(process \d+ on .* has ended", errors[0]), errors[0]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5"]
    assert run(folder, 1, resume=True) == ([0], [""])
    check_close(folder, alone, rel=1e-4)


class Compiled(TrainerCallback):
    def on_train_end(self, trainer: Trainer) -> None:
        assert sum(torch._dynamo.utils.counters["frames"].values()) > 0


def check_compiled(rank: int, trainer: Trainer) -> None:
    trainer.callbacks.append(Compiled())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rel"), [({"torch_compile": True}, 1e-4), ({"bf16": True}, 0.05), ({"fp16": True}, 0.02)]
)
def test_fsdp_resumes_what_one_process_began(tmp_path: Path, alone: Path, changes: dict[str, Any], rel: float) -> None:
    """Mixed precision by FSDP's policy has 16 bits for weights and activations, and float32 for sums of gradients."""
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    for path in list_checkpoints(folder)[2:]:
        shutil.rmtree(path)
    prepare = check_compiled if "torch_compile" in changes else None
    assert run(folder, 2, prepare, resume=True, parallel="fsdp", **changes) == ([0, 0], ["", ""])
    check_close(folder, alone, rel)


def overflow(rank: int, trainer: Trainer) -> None:
    """Make the loss of the last process infinite in one step."""
    if rank == trainer.processes.count - 1:
        compute = trainer.loss_of
        trainer.loss_of = lambda batch: compute(batch) * (math.inf if trainer.state.global_step == 6 else 1.0)


@pytest.mark.parametrize("parallel", ["data", "fsdp"])
def test_processes_agree_to_skip_an_overflow(tmp_path: Path, parallel: str) -> None:
    settings = {"fp16": True, "max_steps": 9, "eval_steps": 9, "save_steps": 9}
    for name, count, changes in (("one", 1, {}), ("two", 2, {"parallel": parallel})):
        assert run(tmp_path / name, count, overflow, **settings, **changes) == ([0] * count, [""] * count)
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert [entry["overflow_steps"] for entry in two if "loss" in entry] == [0, 0, 1]
    assert [entry["loss_scale"] for entry in two if "loss" in entry] == [65536.0, 65536.0, 32768.0]
    if parallel == "data":
        assert one == two
        assert exact(tmp_path / "one" / "checkpoint-9") == exact(tmp_path / "two" / "checkpoint-9")


def adapted(args: TrainingArguments) -> torch.nn.Module:
    model = tiny_gpt()
    add_adapter(model, r=2, dora=True, target_modules="all-linear", modules_to_save=["ln_f"],
                trainable_token_indices=[1, 5])  # fmt: skip
    return model


class SaveAtEnd(TrainerCallback):
    def on_train_end(self, trainer: Trainer) -> None:
        trainer.save_model()


def save_at_end(rank: int, trainer: Trainer) -> None:
    trainer.callbacks.append(SaveAtEnd())


@pytest.mark.slow
def test_fsdp_trains_adapters(tmp_path: Path) -> None:
    for name, count, changes in (("one", 1, {}), ("two", 2, {"parallel": "fsdp"})):
        found = run(tmp_path / name, count, save_at_end, make=adapted, max_steps=6, **changes)
        assert found == ([0] * count, [""] * count)
    check_close(tmp_path / "two", tmp_path / "one", rel=1e-4)
    mine, theirs = (load_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


def in_parts(args: TrainingArguments, weights: Path | None = None) -> torch.nn.Module:
    """Build a model for FSDP, and compare its bits with those of one that was built whole."""
    model = sharded_model(tiny_gpt, args, "cpu", weights)
    torch.manual_seed(1)
    expected = (tiny_gpt() if weights is None else GPT.from_pretrained(weights)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), expected[name])
    return model


def test_fsdp_builds_a_model_in_parts(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, 2, parallel="fsdp", make=in_parts) == ([0, 0], ["", ""])
    check_close(folder, alone, rel=1e-4)
    weights = functools.partial(in_parts, weights=alone / "checkpoint-5")
    assert (
        run(tmp_path / "other", 2, parallel="fsdp", max_steps=1, eval_steps=1, save_steps=0, make=weights)[0] == [0] * 2
    )


def peak() -> int:
    """Return the most bytes of memory that this process has had."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measured(args: TrainingArguments, weights: Path | None) -> torch.nn.Module:
    config = GPTConfig(vocab_size=32, n_positions=8, n_embd=256, n_layer=12, n_head=2)
    in_parts(args)  # loads what is imported when it is needed
    before = peak()
    sharded_model(lambda: GPT(config), args, "cpu", weights)
    used, whole = peak() - before, 4 * config.num_parameters
    assert used < 0.8 * whole, f"{used / 1e6:.1f} MB for a model of {whole / 1e6:.1f} MB"
    os._exit(0)


def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    assert run(tmp_path / "new", 2, parallel="fsdp", make=functools.partial(measured, weights=None)) == (
        [0, 0],
        ["", ""],
    )
    GPT(GPTConfig(vocab_size=32, n_positions=8, n_embd=256, n_layer=12, n_head=2)).save_pretrained(tmp_path / "model")
    read = functools.partial(measured, weights=tmp_path / "model")
    assert run(tmp_path / "read", 2, parallel="fsdp", make=read) == ([0, 0], ["", ""])


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


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command that trains a tiny model in two steps, but for its output folder."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(300)))
    options = "--max-steps 2 --samples 0 --warmup-steps 0 --eval-steps none --threads 1 --disable-tqdm --device cpu"
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    return ["train", str(text), *options.split()]


NEW = ["--n-embd", "16", "--n-layer", "1", "--n-head", "2", "--n-positions", "16", "--tokenizer-kind", "char"]


def work_by_command(rank: int, folder: Path, options: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=2)
    os._exit(main([*options, "--gradient-accumulation-steps", "2"]))


@pytest.mark.slow
def test_the_command_line_shards_new_models_and_old_ones(tmp_path: Path, command: list[str]) -> None:
    for name, options in (("new", NEW), ("old", ["--init-from", str(tmp_path / "new one")])):
        one, two = ([*command, *options, "--output-dir", str(tmp_path / f"{name} {count}")] for count in ("one", "two"))
        assert main([*one, "--gradient-accumulation-steps", "2"]) == 0
        arguments = (tmp_path / f"{name} group", [*two, "--parallel", "fsdp"])
        members = [processes.Process(target=work_by_command, args=(rank, *arguments)) for rank in range(2)]
        for member in members:
            member.start()
        for member in members:
            member.join(60)
        assert [member.exitcode for member in members] == [0, 0]
        mine, theirs = (tensors(tmp_path / f"{name} {count}" / "checkpoint-2") for count in ("two", "one"))
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-5)


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
