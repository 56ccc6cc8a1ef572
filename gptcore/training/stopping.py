"""When a run ends before its last step, and which of its checkpoints is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from gptcore.training.arguments import TrainingArguments
from gptcore.training.state import TrainerState

STOP, INTERRUPT = 1, 2  # why a run ends: by its arguments, or by a signal; processes agree on the highest


class Stopping:
    """The rules of max_time, early_stopping_patience and metric_for_best_model; time begins now."""

    def __init__(self, args: TrainingArguments, state: TrainerState) -> None:
        self.args, self.state, self._begun = args, state, time.monotonic()

    def wish(self, signals: list[int]) -> int:
        """Return INTERRUPT after a signal, STOP after max_time, else 0."""
        limit = self.args.max_time
        return INTERRUPT if signals else STOP if limit is not None and time.monotonic() - self._begun >= limit else 0

    def judge(self, metrics: Mapping[str, Any]) -> int:
        """Count evaluations since the best; return STOP out of patience, else 0.

        A metric may stay at its first value while the model learns: an F1 of 0, the accuracy of the commonest label.
        Until it improves for the first time, an evaluation with the lowest loss so far does not count.
        Raises ValueError if there is no metric_for_best_model.
        """
        name, state = self.args.metric_for_best_model, self.state
        if name not in metrics:
            raise ValueError(f"metric_for_best_model is {name!r}, but an evaluation has {', '.join(metrics)}")
        loss = float(metrics["eval_loss"])
        learns = math.isfinite(loss) and (state.lowest_loss is None or loss < state.lowest_loss)
        state.lowest_loss = loss if learns else state.lowest_loss
        if self._is_better(metrics[name], state.best_evaluated):
            state.improved = state.best_evaluated is not None
            state.best_evaluated, state.evaluations_since = metrics[name], 0
        elif learns and not state.improved:
            state.evaluations_since = 0
        else:
            state.evaluations_since += 1
        return STOP if self._is_out_of_patience() else 0

    def end(self, total_steps: int) -> int:
        """Return the step at which training ends: the current one if the run that is resumed ended early."""
        return self.state.global_step if self._is_out_of_patience() else total_steps

    def _is_out_of_patience(self) -> bool:
        patience = self.args.early_stopping_patience
        return patience is not None and self.state.evaluations_since >= patience

    def note_checkpoint(self, metrics: Mapping[str, Any]) -> None:
        """Note that the checkpoint of this step is the best so far, if its metrics say so."""
        metric = metrics.get(self.args.metric_for_best_model, math.nan)
        if self._is_better(metric, self.state.best_metric):
            self.state.best_metric, self.state.best_step = metric, self.state.global_step

    def _is_better(self, metric: float, best: float | None) -> bool:
        greater = self.args.greater_is_better
        return math.isfinite(metric) and (best is None or (metric > best if greater else metric < best))
