"""Checkpoints under SIGKILL, SIGINT, full disks and flipped bits: never unreadable, and resuming is bit for bit."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.training import checkpoint
from gptcore.training.callbacks import TrainerCallback, read_log
from gptcore.training.checkpoint import CheckpointError, list_checkpoints, newest_checkpoint, verify_checkpoint
from gptcore.training.random_state import own_randomness, random_state, seed_everything, set_random_state
from gptcore.training.trainer import Trainer, TrainingArguments, TrainingInterrupted

STEPS = 60
EXACT = ("model.safetensors", "optimizer.safetensors", "random_state.json")  # the same bytes from the same course

# A server that has imported PyTorch forks each process in milliseconds; it never computes, so has no threads to lose.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["gptcore.training.trainer", "torch._dynamo", "pytest", "hypothesis.strategies"])


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def tiny_trainer(folder: Path, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any) -> Trainer:
    """A GPT with dropout, so that random state matters, on 50 examples, so that epochs end in odd steps."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    data = torch.randint(0, 32, (50, 8), generator=torch.Generator().manual_seed(0))
    args: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    args |= {"max_steps": STEPS, "logging_steps": 3, "eval_steps": 4, "save_steps": 2, "disable_tqdm": True}
    return Trainer(
        model, TrainingArguments(str(folder), **args | changes), data[:44], data[44:], collate, callbacks=callbacks
    )


def train(folder: Path, started: Any = None, die_at_call: int | None = None, calls: Any = None, **changes: Any) -> None:
    """What each process runs: start, or go on from the newest checkpoint; it may kill itself in the midst of it."""
    torch.set_num_threads(1)
    callbacks = (Slow(),) if changes.pop("slow", False) else ()
    resume = bool(list_checkpoints(folder)) if folder.exists() else False
    trainer = tiny_trainer(folder, callbacks, overwrite_output_dir=not resume, **changes)
    if calls is not None or die_at_call is not None:
        count_disk_calls(die_at_call, calls)
    if started is not None:
        started.set()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except TrainingInterrupted as interrupt:
        told = interrupt.checkpoint == newest_checkpoint(folder) and str(interrupt.checkpoint) in str(interrupt)
        os._exit(77 if told else 1)
    except KeyboardInterrupt:
        os._exit(78)


class Slow(TrainerCallback):
    def on_step_end(self, trainer: Trainer) -> None:
        end = time.monotonic() + 0.05
        while (left := end - time.monotonic()) > 0:
            time.sleep(left)


def count_disk_calls(die_at_call: int | None, calls: Any) -> None:
    """Count what changes the disk for good; at call number `die_at_call`, die instead of doing it."""
    done = 0
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):

        def counted(*args: Any, _call: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == die_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            if calls is not None:
                calls.value = done
            return _call(*args, **kwargs)

        setattr(os, name, functools.partial(counted, _call=getattr(os, name)))


def start(folder: Path, **kwargs: Any) -> BaseProcess:
    process = processes.Process(target=train, args=(folder,), kwargs=kwargs)
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    process.join(60)
    assert process.exitcode is not None, "a training process hangs"
    return process.exitcode


def exact(path: Path) -> dict[str, str]:
    manifest = json.loads((path / "manifest.json").read_text())
    return {name: manifest[name]["sha256"] for name in EXACT}


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(folder / "log.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(folder)) == 0
    assert [checkpoint.checkpoint_step(path) for path in list_checkpoints(folder)] == list(range(2, STEPS + 1, 2))
    return folder


def check_whole(folder: Path, uninterrupted: Path) -> None:
    """Every checkpoint that a kill left is whole, and bit for bit the one of the uninterrupted run."""
    for path in list_checkpoints(folder):
        verify_checkpoint(path)
        assert exact(path) == exact(uninterrupted / path.name), path


def check_end(folder: Path, uninterrupted: Path) -> None:
    assert finish(start(folder, save_total_limit=2)) == 0
    check_whole(folder, uninterrupted)
    assert f"checkpoint-{STEPS}" in os.listdir(folder)
    assert losses(folder) == losses(uninterrupted)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def test_same_run_twice_is_the_same(tmp_path: Path, uninterrupted: Path) -> None:
    check_end(tmp_path, uninterrupted)


def newest_step(folder: Path) -> int:
    return max([0, *map(checkpoint.checkpoint_step, list_checkpoints(folder))])


def saving(folder: Path) -> bool:
    return any(name.startswith(".checkpoint") for name in os.listdir(folder))


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.0002)


def test_kill_at_random_moments(tmp_path: Path, uninterrupted: Path) -> None:
    rng, kills, resumed = random.Random(0), 0, 0
    while kills < 14 or resumed < 10:
        begin = newest_step(tmp_path)
        goal = begin + 2 * rng.randint(0, 3)  # not by the clock alone, so that slow machines get somewhere, too
        started = processes.Event()
        process = start(tmp_path, started=started, save_total_limit=2)
        assert started.wait(60)
        wait_for(lambda goal=goal: newest_step(tmp_path) >= goal, process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.04))
        process.kill()
        if finish(process) == -signal.SIGKILL:
            kills, resumed = kills + 1, resumed + (begin > 0)
        else:  # it was done: once more from the beginning
            assert losses(tmp_path) == losses(uninterrupted)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
        check_whole(tmp_path, uninterrupted)
    check_end(tmp_path, uninterrupted)


def test_kill_during_saves(tmp_path: Path, uninterrupted: Path) -> None:
    rng, hits = random.Random(1), 0
    for _ in range(10):
        goal = newest_step(tmp_path) + 2 * rng.randint(0, 2)
        process = start(tmp_path, save_total_limit=2)
        wait_for(lambda goal=goal: newest_step(tmp_path) >= goal and saving(tmp_path), process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.006))
        process.kill()
        finish(process)
        hits += saving(tmp_path)
        check_whole(tmp_path, uninterrupted)
    assert hits > 0, "no kill hit a save"
    assert newest_step(tmp_path) > 2, "no run went on from a checkpoint"
    check_end(tmp_path, uninterrupted)


def test_kill_before_each_call_that_changes_the_disk(tmp_path: Path, uninterrupted: Path) -> None:
    calls = processes.Value("i", 0)
    assert finish(start(tmp_path / "count", calls=calls, max_steps=4, save_total_limit=1)) == 0
    folder = tmp_path / "killed"
    for call in range(calls.value):  # a start, two saves, and the deletion of a checkpoint
        if finish(start(folder, die_at_call=call, save_total_limit=1)) == 0:  # it was near its end
            assert losses(folder) == losses(uninterrupted)
            shutil.rmtree(folder)
        else:
            check_whole(folder, uninterrupted)
    check_end(folder, uninterrupted)


# ---- signals that ask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_can_be_resumed(tmp_path: Path, uninterrupted: Path, number: int) -> None:
    started = processes.Event()
    process = start(tmp_path, started=started, slow=True, save_steps=0)
    assert started.wait(60)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finish(process) == 77
    (path,) = list_checkpoints(tmp_path)
    assert 0 < checkpoint.checkpoint_step(path) < STEPS
    check_end(tmp_path, uninterrupted)


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    started = processes.Event()
    process = start(tmp_path, started=started, slow=True, save_steps=0)
    assert started.wait(60)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 78
    assert list_checkpoints(tmp_path) == []


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    tiny_trainer(tmp_path, max_steps=1).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("two")
    tiny_trainer(folder, max_steps=4).train()
    return folder


@contextlib.contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    before = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def test_files(two: Path) -> None:
    files = {"config.json", "trainer_state.json", "manifest.json", *EXACT}
    assert set(os.listdir(two / "checkpoint-4")) == files
    for name in files - {"manifest.json"}:
        head = (two / "checkpoint-4" / name).read_bytes()[:16]
        assert head[:1] == b"{" or head[8:9] == b"{", "JSON or safetensors, never a pickle"


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json", "manifest.json", *EXACT])
def test_damage_is_found_and_named(two: Path, name: str) -> None:
    file = two / "checkpoint-4" / name
    whole = file.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in (0, 9, len(whole) // 2, len(whole) - 1)
    ]
    for content in [None, b"", whole[:-2], whole[: len(whole) // 2], whole + b"\0", *flipped]:
        with changed(file, content):
            with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*\." + name.split(".")[1]):
                verify_checkpoint(file.parent)
            with pytest.raises(CheckpointError, match="damaged"):
                tiny_trainer(two, max_steps=4).train(resume_from_checkpoint=file.parent)
            with pytest.warns(UserWarning, match="checkpoint-4 is damaged.*passed over for .*checkpoint-2"):
                assert newest_checkpoint(two).name == "checkpoint-2"
    verify_checkpoint(file.parent)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_passes(two: Path, data: st.DataObject) -> None:
    file = two / "checkpoint-4" / data.draw(st.sampled_from(["manifest.json", "trainer_state.json", *EXACT]))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with changed(file, bytes(content)), pytest.raises(CheckpointError):
        verify_checkpoint(file.parent)


def test_resume_passes_over_a_damaged_checkpoint_and_replaces_it(two: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    file = folder / "checkpoint-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged: optimizer.safetensors"):
        tiny_trainer(folder, max_steps=4).train(resume_from_checkpoint=True)
    assert exact(folder / "checkpoint-4") == exact(two / "checkpoint-4")
    assert losses(folder) == losses(two)
    for path in list_checkpoints(folder):
        (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*checkpoint-2 is damaged"):
        tiny_trainer(folder, max_steps=4).train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no folder checkpoint-<step>"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-7")


def test_older_checkpoint_of_the_same_folder_is_refused(two: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is not the newest.*checkpoint-4 is whole"):
        tiny_trainer(two, max_steps=4).train(resume_from_checkpoint=two / "checkpoint-2")
    tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=two / "checkpoint-2")  # elsewhere it is fine
    assert exact(tmp_path / "checkpoint-4") == exact(two / "checkpoint-4")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, two: Path) -> None:
    tiny_trainer(tmp_path, max_steps=2, lr_scheduler_type="constant").train()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file beyond this: what a full disk looks like
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written.*bytes are free"):
            tiny_trainer(tmp_path, max_steps=4, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            tiny_trainer(tmp_path).save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "log.jsonl"]
    tiny_trainer(tmp_path, max_steps=4, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_other_model_is_refused(two: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=4)
    trainer.model = GPT(GPTConfig(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.warns(UserWarning, match="n_embd 16 -> 8"), pytest.raises(CheckpointError, match="another model"):
        trainer.train(resume_from_checkpoint=two / "checkpoint-4")


# ---- which checkpoints stay ------------------------------------------------------------------------------------------


def test_total_limit_keeps_newest_and_best(tmp_path: Path) -> None:
    eval_loss = iter([3.0, 1.0, 2.0, 4.0, 5.0])

    class Scripted(Trainer):
        def evaluate(self) -> dict[str, float]:
            return {"eval_loss": next(eval_loss)}

    trainer = tiny_trainer(tmp_path, max_steps=10, eval_steps=2, save_total_limit=2)
    trainer.__class__ = Scripted
    (tmp_path / "checkpoint-best").mkdir()
    trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-4", "checkpoint-best", "log.jsonl"]
    assert (trainer.state.best_metric, trainer.state.best_step) == (1.0, 4)


def test_total_limit_goes_by_step_and_spares_what_is_not_ours(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=10, eval_steps=None).train()
    os.utime(tmp_path / "checkpoint-2")  # the youngest by its time stamp
    (tmp_path / "checkpoint-3").mkdir()  # not ours: no manifest
    checkpoint.rotate_checkpoints(tmp_path, limit=2, newest=10, best=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-8", "checkpoint-10"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with checkpoint.exclusive(tmp_path), pytest.raises(CheckpointError, match="another process is training into"):
        tiny_trainer(tmp_path).train()


# ---- random state ----------------------------------------------------------------------------------------------------


def draws() -> list[Any]:
    state = np.random.mtrand._rand
    return [random.random(), random.gauss(0, 1), *state.standard_normal(3), *torch.rand(3).tolist()]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), odd=st.booleans())
def test_random_state_round_trips_through_json(seed: int, odd: bool) -> None:
    seed_everything(seed)
    if odd:  # half of a pair of normal numbers is kept for the next call
        draws()
        random.gauss(0, 1)
    state = json.loads(json.dumps(random_state()))
    first = draws()
    set_random_state(state)
    assert draws() == first
    with own_randomness(seed):
        draws()
    set_random_state(state)
    with own_randomness(0):
        inner = draws()
    with own_randomness(0):
        assert draws() == inner
    assert draws() == first
