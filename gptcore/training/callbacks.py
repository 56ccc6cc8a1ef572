"""Output of training: log.jsonl, the progress line, and callbacks."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gptcore.files import PathLike, atomic_file, entry, make_folder, open_file, parse_json
from gptcore.output import SteadyOutput
from gptcore.training.plan import correction

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer


CORRECTED = 10  # steps after which the plan's time is corrected
LINE_LIMIT = 1 << 20  # bytes of a line in log.jsonl


class TrainerCallback:
    """Methods that the trainer calls; override some. `trainer` has model, args, state and the datasets.

    An exception from a callback stops training. Training stays reproducible as long as a callback leaves the weights
    and the global random generators alone (`model.generate` draws from a generator of its own).
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called before the first step, after a checkpoint was loaded."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each update of the weights; the clipped gradients of all micro-batches are still there."""

    def on_log(self, trainer: Trainer, logs: dict[str, Any]) -> None:
        """Called after a line was written to log.jsonl."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after each evaluation, also outside of training."""

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        """Called after a checkpoint was written."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called when training ends, also by an error or an interrupt."""


def read_log(path: PathLike, skip_damage: bool = False) -> list[dict[str, Any]]:
    """Return the entries of a log.jsonl, in order, without a last line torn by a kill.

    Raises ValueError, naming the line, for other damage; skip_damage: leaves such lines out, with a warning.
    """
    entries: list[dict[str, Any]] = []
    with open_file(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT):
            number += 1
            where = f"{path}, line {number}"
            try:
                if len(line) == LINE_LIMIT:
                    raise ValueError(f"{where} has {LINE_LIMIT:,} bytes or more; nothing behind it is read")
                values = parse_json(line, where)
                entry(values, "step", int, where)
                entries.append(values)
            except ValueError as error:
                if line.startswith(b"{") and not line.endswith(b"\n") and len(line) < LINE_LIMIT:
                    break  # torn by a kill
                if not skip_damage:
                    raise
                warnings.warn(f"{error}; the line is left out", stacklevel=2)
                if len(line) == LINE_LIMIT:
                    break
    return entries


class LogFile:
    """log.jsonl, opened for appending; entries of steps after `last_step` are dropped.

    If it is deleted during the run, it is made anew, with a warning.
    """

    def __init__(self, path: PathLike, last_step: int) -> None:
        self.path = Path(path)
        entries = read_log(path, skip_damage=True) if os.path.lexists(path) else []
        with atomic_file(path) as aside:
            aside.write_text("".join(_line(line) for line in entries if line["step"] <= last_step), encoding="utf-8")
        self._open()

    def _open(self) -> None:
        make_folder(self.path.parent)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for as long as the run)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line with one write, so that no reader and no kill finds a part of it."""
        self._reopen_if_deleted(entry["step"])
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> None:
        """Flush to the disk, before a checkpoint that relies on the lines up to its step."""
        os.fsync(self._file.fileno())

    def _reopen_if_deleted(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        warnings.warn(
            f"{self.path} was deleted or replaced during training: lines before step {step} are lost", stacklevel=3
        )
        self._file.close()
        self._open()

    def close(self) -> None:
        self._file.close()


def _line(entry: Mapping[str, Any]) -> str:
    # JSON has neither NaN nor infinity: null
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class ProgressLine(TrainerCallback):
    """On a terminal one live line with step, loss, learning rate, tokens/s and time left; else a line per log entry.

    If the output cannot be written, as to a closed pipe or a full disk, the run continues without it.
    """

    REFRESH = 0.25  # seconds

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=SteadyOutput())  # type: ignore[arg-type]
        self.live: Progress | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        self._print(trainer.plan())
        self.started, self.first_step = time.perf_counter(), trainer.state.global_step
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"),
                console=self.console, auto_refresh=False,  # in no thread of its own, where errors cannot be caught
            )  # fmt: skip
            self.task = self.live.add_task("", total=trainer.total_steps, completed=self.first_step)
            self.refreshed = -math.inf
            with self._output():
                self.live.start()

    def on_step_end(self, trainer: Trainer) -> None:
        logs = trainer.last_step
        if trainer.state.global_step == self.first_step + CORRECTED and logs:
            self._print(correction(trainer, self.first_step))
        if self.live is None or not logs or time.perf_counter() < self.refreshed + self.REFRESH:
            return
        self._show(trainer)
        self.refreshed = time.perf_counter()

    def on_log(self, trainer: Trainer, logs: dict[str, Any]) -> None:
        shown = [f"step {logs['step']}/{trainer.total_steps}"]
        best = {trainer.args.metric_for_best_model: ".4f"}
        formats = {"loss": ".4f", "eval_loss": ".4f", **best, "learning_rate": ".2e", "tokens_per_second": ",.0f"}
        shown += [f"{name} {logs[name]:{form}}" for name, form in formats.items() if name in logs]
        shown += [f"mfu {logs['mfu']:.1%}" if "mfu" in logs else "mfu n/a"] if "loss" in logs else []
        if self.live is None:
            self._print("  ".join([*shown, f"{self._left(trainer)} left"]))
        elif "eval_loss" in logs:
            self._print("  ".join(shown))

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        self._print(f"saved {checkpoint}")

    def on_train_end(self, trainer: Trainer) -> None:
        if self.live is not None:
            if trainer.last_step:
                self._show(trainer)
            with self._output():
                self.live.stop()
            self.live = None

    def _show(self, trainer: Trainer) -> None:
        logs = trainer.last_step
        text = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:,.0f} tokens/s"
        with self._output():
            assert self.live is not None
            description = f"{text}  {self._left(trainer)} left"
            self.live.update(self.task, completed=trainer.state.global_step, description=description, refresh=True)

    def _print(self, text: str) -> None:
        with self._output():
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, SystemExit):  # SystemExit is what rich makes of a closed pipe
            self.console.quiet = True

    def _left(self, trainer: Trainer) -> str:
        done, left = trainer.state.global_step - self.first_step, trainer.total_steps - trainer.state.global_step
        seconds = int((time.perf_counter() - self.started) / max(1, done) * left)
        return str(datetime.timedelta(seconds=min(seconds, 10**10)))
