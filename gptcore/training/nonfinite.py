"""Steps whose loss or gradient is not finite: which tensor is the first, and what float16 may overflow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

from gptcore.training import checkpoint
from gptcore.training.mixed_precision import MIN_SCALE
from gptcore.training.state import NonFiniteError

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer


def _is_finite(tensor: Any) -> bool:
    finite = tensor.isfinite().all()
    return bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite)


def count_overflow(trainer: Trainer, step: int) -> None:
    """Count a step whose gradient overflowed. Raises NonFiniteError if the loss was not scaled up any more."""
    trainer.state.overflow_steps, trainer.last_overflow = trainer.state.overflow_steps + 1, step
    trainer.unread.found_inf.zero_()
    if (scale := trainer.precision.scaler.get_scale()) < MIN_SCALE:
        raise NonFiniteError(
            f"step {step}: the gradient overflows float16 with a loss scale of {2 * scale:g}, the lowest; "
            f"{trainer.state.overflow_steps} of {step} steps overflowed. Use bf16=True or a lower learning rate, or "
            "resume from an earlier checkpoint",
            step,
            "gradient norm",
        )


def stop_at_non_finite(trainer: Trainer, step: int, loss: float, grad_norm: float) -> NoReturn:
    trainer.state.global_step, trainer.state.epoch = step - 1, (step - 1) / trainer.steps_per_epoch
    saved = [path for path in checkpoint.list_checkpoints(trainer.folder) if checkpoint.is_ours(path)]
    advice = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    named = list(trainer.own_model.named_parameters())
    bad = [f"parameter {name}" for name, parameter in named if not _is_finite(parameter)]
    bad += [] if math.isfinite(loss) else ["loss"]
    gradients = [(name, parameter.grad) for name, parameter in named if parameter.grad is not None]
    bad += [f"gradient of {name}" for name, gradient in gradients if not _is_finite(gradient)]
    tensor = [*bad, "gradient norm"][0]
    raise NonFiniteError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; the first tensor that is not finite "
        f"is the {tensor}. The weights are those of step {step - 1}; {advice}",
        step,
        tensor,
    )
