"""The numbers that a run carries from step to step, and the results of steps that are still on the device."""

from __future__ import annotations

import math
import time
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of step `step` is NaN or infinite, `tensor` first; the weights were not updated."""

    def __init__(self, message: str, step: int, tensor: str) -> None:
        self.step, self.tensor = step, tensor
        super().__init__(message)


@dataclass
class Sums:
    """Sums over steps, and the means that follow."""

    tokens: int = 0  # of input, padding included
    labels: int = 0  # targets that the loss is a mean over
    loss: float = 0.0  # over those targets
    seconds: float = 0.0  # in steps: without evaluations and saves
    padding: int = 0  # of the tokens

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        loss = self.loss / self.labels if self.labels else math.nan
        means = {"loss": loss, "tokens_per_second": self.tokens / max(1e-9, self.seconds)}
        return means | ({"padding": self.padding / self.tokens} if self.padding else {})


@dataclass
class TrainerState:
    """All that the loop carries from step to step beside weights, optimizer and random generators."""

    global_step: int = 0  # updates done, and steps skipped
    epoch: float = 0.0
    total: Sums = field(default_factory=Sums)  # since step 0
    window: Sums = field(default_factory=Sums)  # since the last line in the log
    best_metric: float | None = None  # the best metric of those that have a checkpoint of the same step
    best_step: int | None = None
    best_evaluated: float | None = None  # of all evaluations, for early stopping
    evaluations_since: int = 0  # the one with that metric
    improved: bool = False  # whether that metric is better than the first
    lowest_loss: float | None = None  # of all evaluations
    skipped_steps: int = 0  # steps without a target, which update nothing
    overflow_steps: int = 0  # steps whose gradient overflowed float16: they update nothing and do not count for lr_at
    scaler: dict[str, Any] = field(default_factory=dict)  # of the loss, with fp16


class TrainOutput(NamedTuple):
    """Result of Trainer.train; training_loss is the mean over all targets since step 0."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class StepResult(NamedTuple):
    """One update; loss and grad_norm are scalars on the device until they are read."""

    step: int
    tokens: int
    padding: int
    targets: int
    learning_rate: float
    loss: Tensor
    grad_norm: Tensor


class UnreadSteps:
    """Results of the last steps, read together by one device-to-host synchronisation."""

    LIMIT = 100  # steps: the progress line shows numbers that are at most this old

    def __init__(self, device: torch.device, each: bool = False) -> None:
        self.steps: list[StepResult] = []
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)  # 1 from the first bad step on
        self.at_once = each or device.type == "cpu"  # where reading does not synchronise

    def start(self) -> None:
        """Start the clock, unless it runs since an earlier step that is unread."""
        if not self.steps:
            self._started = time.perf_counter()

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return found_inf for the optimizer: 1 from the first step whose loss or gradient norm is not finite, else 0.

        So later updates are skipped as well, and the weights stay those before that step until it is read.
        """
        self.found_inf = torch.maximum(self.found_inf, 1.0 - torch.isfinite(loss + grad_norm).float())
        return self.found_inf

    def due(self) -> bool:
        """Return whether the results should be read even if nothing is logged."""
        return self.at_once or len(self.steps) >= self.LIMIT

    def read(self) -> list[tuple[StepResult, Sums, float, float]]:
        """Return each unread step with its sums, loss and gradient norm as Python numbers."""
        steps, self.steps = self.steps, []
        if not steps:
            return []
        numbers = torch.stack([torch.stack([step.loss.double(), step.grad_norm.double()]) for step in steps]).tolist()
        seconds = (time.perf_counter() - self._started) / len(steps)
        return [
            (step, Sums(step.tokens, step.targets, loss * step.targets, seconds, step.padding), loss, grad_norm)
            for step, (loss, grad_norm) in zip(steps, numbers, strict=True)
        ]
