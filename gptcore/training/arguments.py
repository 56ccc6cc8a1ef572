"""The arguments of a training run, checked when they are made; its learning rates and number of steps."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

MOST = 10**12  # of steps, epochs and all other counts


def _arg(default: Any, help: str, resume: Literal["same", "warn", "free"] = "warn") -> Any:
    """Return a field with its line of help, and the rule if a resumed run has another value than its checkpoint:

    "same": an error, because the position in the data would mean something else; "warn": a warning, because the run
    differs from the one that was begun; "free": nothing.
    """
    return field(default=default, metadata={"help": help, "resume": resume})


@dataclass
class TrainingArguments:
    """Names and defaults of Hugging Face's class of this name. Raises TypeError or ValueError, naming the argument."""

    output_dir: str = _arg(dataclasses.MISSING, "folder for checkpoints, log.jsonl and the model", "free")
    overwrite_output_dir: bool = _arg(False, "replace the run or model that output_dir holds", "free")
    num_train_epochs: float = _arg(3.0, "passes over the training data, unless max_steps is given", "free")
    max_steps: int = _arg(-1, "updates of the weights; -1: as many as num_train_epochs takes", "free")
    per_device_train_batch_size: int = _arg(8, "examples in a forward and backward pass", "same")
    per_device_eval_batch_size: int = _arg(8, "examples in a forward pass of an evaluation", "free")
    gradient_accumulation_steps: int = _arg(1, "passes per update of the weights", "same")
    learning_rate: float = _arg(5e-5, "the highest learning rate of the schedule")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _arg("linear", "decay to 0 after warmup, or constant")
    warmup_steps: int = _arg(0, "steps in which the learning rate rises linearly to its highest")
    weight_decay: float = _arg(0.0, "AdamW's decay of matrices, embeddings included; biases and norms never decay")
    adam_beta1: float = _arg(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = _arg(0.999, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = _arg(1e-8, "added to the denominator of AdamW's update")
    max_grad_norm: float = _arg(1.0, "clip the norm of all gradients together to this; 0: do not clip")
    logging_steps: int = _arg(500, "steps between lines in log.jsonl; the last step has one too; 0: none", "free")
    eval_steps: int | None = _arg(None, "steps between evaluations; the last step has one too; none: never", "free")
    save_steps: int = _arg(500, "steps between checkpoints; the last step has one too; 0: if interrupted", "free")
    save_total_limit: int | None = _arg(None, "checkpoints to keep; newest and best always stay; none: all", "free")
    seed: int = _arg(42, "of the order of the data and of dropout", "same")
    bf16: bool = _arg(False, "compute in bfloat16 where autocast does; weights and optimizer stay float32")
    disable_tqdm: bool = _arg(False, "print neither plan nor progress", "free")

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str | os.PathLike) or not os.fspath(self.output_dir):
            raise TypeError(f"output_dir should be the path of a folder, not {self.output_dir!r}")
        self.output_dir = os.path.expanduser(os.fspath(self.output_dir))
        for name, kind in get_type_hints(type(self)).items():
            value = _plain_number(getattr(self, name), kind)
            setattr(self, name, value)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise ValueError(f"{name} {value!r} is not supported; it should be one of {get_args(kind)}")
            elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{name} should be of type {getattr(kind, '__name__', kind)}, not {value!r}")
            elif isinstance(value, int | float) and name != "seed" and MOST < value < math.inf:
                raise ValueError(f"{name} should be at most {MOST:,}, not {value}")
        for names, allowed, expected in _LIMITS:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not allowed(value):
                    raise ValueError(f"{name} should be {expected}, not {value}")


_LIMITS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_steps save_total_limit",
     lambda value: value >= 1, "at least 1"),
    ("max_steps", lambda value: value >= 1 or value == -1, "at least 1, or -1 to obey num_train_epochs"),
    ("warmup_steps logging_steps save_steps", lambda value: value >= 0, "at least 0"),
    ("num_train_epochs learning_rate adam_epsilon", lambda value: 0 < value < math.inf, "positive and finite"),
    ("weight_decay max_grad_norm", lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    ("adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
]  # fmt: skip


def _plain_number(value: Any, kind: Any) -> Any:
    """Return NumPy's numbers, and whole numbers where a float is expected, as Python's int or float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if kind is float:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # an int of 309 digits
    takes_int = kind is int or (isinstance(kind, types.UnionType) and int in get_args(kind))
    return int(value) if takes_int and isinstance(value, numbers.Integral) else value


def lr_at(step: int, args: TrainingArguments, total_steps: int) -> float:
    """Return the learning rate of the update that follows `step` updates, for step = 0 ... total_steps - 1.

    Warmup rises in equal steps to args.learning_rate at step `warmup_steps`; the decay would reach 0 at total_steps. So
    no update has a learning rate of 0, the first and the last included.
    """
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / (args.warmup_steps + 1)
    if args.lr_scheduler_type == "constant":
        return args.learning_rate
    left = (total_steps - step) / (total_steps - args.warmup_steps)  # 1 after warmup, 0 at the end
    return args.learning_rate * (left if args.lr_scheduler_type == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def total_steps(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Return the step at which training ends. Raises ValueError for epochs of more than 10**12 steps."""
    if args.max_steps > 0:
        return args.max_steps
    steps = args.num_train_epochs * steps_per_epoch
    if steps > MOST:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs:g}, which takes {steps:.3g} steps of {steps_per_epoch:,} an "
            f"epoch; expected at most {MOST:,}"
        )
    whole = round(steps)  # 0.07 * 100 is 7.000000000000001, and means 7
    return whole if math.isclose(steps, whole, rel_tol=1e-9) else math.ceil(steps)
