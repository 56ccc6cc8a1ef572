"""Checkpoints under SIGKILL, SIGINT and SIGTERM: never unreadable, and resuming is bit-exact."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import STEPS, exact, losses, tiny_trainer

from gptcore.training import checkpoint
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints, newest_checkpoint, verify_checkpoint
from gptcore.training.trainer import Trainer, TrainingInterrupted

pytestmark = pytest.mark.slow

# A server that has imported PyTorch forks each process in milliseconds; it never computes, so has no threads to lose.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["gptcore.training.trainer", "torch._dynamo", "pytest", "hypothesis.strategies"])


def train(folder: Path, started: Any = None, die_at_call: int | None = None, calls: Any = None, **changes: Any) -> None:
    """Train in a child process: start or resume from the newest checkpoint; it may kill itself at any point."""
    torch.set_num_threads(1)
    callbacks = (Slow(changes.pop("slow")),) if "slow" in changes else ()
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
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, trainer: Trainer) -> None:
        end = time.monotonic() + self.seconds
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(folder)) == 0
    assert [checkpoint.checkpoint_step(path) for path in list_checkpoints(folder)] == list(range(2, STEPS + 1, 2))
    return folder


def check_whole(folder: Path, uninterrupted: Path) -> None:
    """Every checkpoint left by a killed run is complete, and bit-identical to that of the uninterrupted run."""
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
    process = start(tmp_path, started=started, slow=0.05, save_steps=0)
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
    process = start(tmp_path, started=started, slow=2.0, save_steps=0)
    assert started.wait(60)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)  # two signals that are pending together are one
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 78
    assert list_checkpoints(tmp_path) == []


def test_resuming_a_finished_run_deletes_what_a_kill_kept_from_rotation(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=4, eval_steps=None).train()  # no limit: as after a kill before the last rotation
    tiny_trainer(tmp_path, max_steps=4, eval_steps=None, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    tiny_trainer(tmp_path, max_steps=1).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
