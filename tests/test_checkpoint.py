"""Checkpoints under SIGKILL, SIGINT and SIGTERM: never unreadable, and resuming is bit-exact."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import processes
from tiny_run import STEPS, exact, losses, tiny_trainer

from gptcore.training import checkpoint
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints, newest_checkpoint, verify_checkpoint
from gptcore.training.trainer import Trainer, TrainingInterrupted

pytestmark = pytest.mark.slow


def train(folder: Path, started: Any = None, die_at_call: int | None = None, calls: Any = None, **changes: Any) -> None:
    """Train in a child process: start or resume from the newest checkpoint; it may kill itself at any point."""
    torch.set_num_threads(1)
    callbacks = (Slow(*changes.pop("slow")),) if "slow" in changes else ()
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
    """Make each step take a while; set events once there was one, and once a signal was taken as a request."""

    def __init__(self, seconds: float, stepped: Any, asked: Any) -> None:
        self.seconds, self.stepped, self.asked = seconds, stepped, asked

    def on_step_end(self, trainer: Trainer) -> None:
        self.stepped.set()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.005)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self.asked.set()


def count_disk_calls(die_at_call: int | None, calls: Any) -> None:
    """Count what changes names on the disk; at call number `die_at_call`, die instead of doing it."""
    done = 0
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):

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
    rng, hits, kills = random.Random(1), 0, 0
    while (hits < 3 or kills < 10) and kills < 100:
        goal = newest_step(tmp_path) + 2 * rng.randint(0, 2)
        process = start(tmp_path, save_total_limit=2)
        wait_for(lambda goal=goal: newest_step(tmp_path) >= goal and saving(tmp_path), process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.006))
        process.kill()
        finish(process)
        kills, hits = kills + 1, hits + saving(tmp_path)
        check_whole(tmp_path, uninterrupted)
        if newest_step(tmp_path) == STEPS and hits < 3:  # once more from the beginning
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert hits >= 3, "no kill hits a save"
    assert newest_step(tmp_path) > 2, "no run went on from a checkpoint"
    check_end(tmp_path, uninterrupted)


def die_at_each_call(folder: Path, uninterrupted: Path, calls: int) -> None:
    """Resume a run and die at each of its calls; fork, because a start by the server takes as long as the run."""
    for call in range(calls):
        child = os.fork()
        if child == 0:
            try:
                train(folder, die_at_call=call, save_total_limit=1)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:  # it was near its end
            assert losses(folder) == losses(uninterrupted)
            shutil.rmtree(folder)
        else:
            assert code == -signal.SIGKILL
            check_whole(folder, uninterrupted)


def test_kill_before_each_call_that_changes_the_disk(tmp_path: Path, uninterrupted: Path) -> None:
    calls = processes.Value("i", 0)
    assert finish(start(tmp_path / "count", calls=calls, max_steps=4, save_total_limit=1)) == 0
    assert calls.value > 50  # a start, two saves, and the deletion of a checkpoint
    process = processes.Process(target=die_at_each_call, args=(tmp_path / "killed", uninterrupted, calls.value))
    process.start()
    assert finish(process) == 0
    check_end(tmp_path / "killed", uninterrupted)


# ---- signals that ask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_can_be_resumed(tmp_path: Path, uninterrupted: Path, number: int) -> None:
    stepped, asked = processes.Event(), processes.Event()
    process = start(tmp_path, slow=(0.05, stepped, asked), save_steps=0)
    assert stepped.wait(60)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finish(process) == 77
    (path,) = list_checkpoints(tmp_path)
    assert 0 < checkpoint.checkpoint_step(path) < STEPS
    check_end(tmp_path, uninterrupted)


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    stepped, asked = processes.Event(), processes.Event()
    process = start(tmp_path, slow=(60, stepped, asked), save_steps=0)
    assert process.pid is not None
    for event in (stepped, asked):  # two signals that are pending together are one
        assert event.wait(30)
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
