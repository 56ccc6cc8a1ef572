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

REPORTS = ("tensorboard", "wandb")
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
    gradient_accumulation_steps: int = _arg(1, "passes per update of the weights, over all processes", "same")
    gradient_reduction: Literal["tree", "all_reduce"] = _arg(
        "tree", "tree: the bits of a run do not depend on the number of processes; all_reduce: in the backend's order"
    )
    parallel: Literal["data", "fsdp"] = _arg(
        "data", "of several processes each has the whole model (data), or a part of weights, gradients and moments"
    )
    learning_rate: float = _arg(5e-5, "the highest learning rate of the schedule")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "warmup_stable_decay", "constant"] = _arg(
        "linear", "decay after warmup; warmup_stable_decay: linearly, in the last lr_decay_ratio of the run"
    )
    min_lr_ratio: float = _arg(0.0, "part of learning_rate at which the decay ends")
    lr_power: float = _arg(1.0, "exponent of the polynomial decay")
    lr_decay_ratio: float = _arg(0.1, "part of the run in which warmup_stable_decay decays")
    warmup_steps: int = _arg(0, "steps in which the learning rate rises linearly to its highest")
    warmup_ratio: float = _arg(0.0, "the same as a part of the run, instead of warmup_steps")
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
    fp16: bool = _arg(False, "compute in float16 where autocast does, with a scaled loss; weights stay float32")
    tf32: bool = _arg(False, "multiply float32 matrices in TF32, on GPUs; the same as matmul_precision high")
    matmul_precision: Literal["default", "highest", "high", "medium"] = _arg(
        "default", "of float32 matrix products, on GPUs, as torch.set_float32_matmul_precision has it"
    )
    gradient_checkpointing: bool = _arg(False, "recompute blocks in the backward pass: less memory, more time", "free")
    torch_compile: bool = _arg(False, "run the model through torch.compile")
    cuda_graph: bool = _arg(False, "repeat forward and backward passes as CUDA graphs, one for each shape", "free")
    packing: bool = _arg(False, "leave padding out: a batch is one row of documents (cu_seqlens)")
    group_by_length: bool = _arg(False, "put examples of similar lengths into a batch", "same")
    load_best_model_at_end: bool = _arg(False, "end with the weights of the best checkpoint, not the last", "free")
    metric_for_best_model: str = _arg("eval_loss", "name in what evaluate() returns, or a callback adds to it")
    greater_is_better: bool = _arg(False, "whether the best metric is the highest")
    early_stopping_patience: int | None = _arg(
        None, "evaluations in a row without a better metric after which training stops; none: never", "free"
    )
    max_time: float | None = _arg(
        None, "seconds after which training saves a checkpoint and stops; none: never", "free"
    )
    report_to: str = _arg("none", "tensorboard, wandb, both with a comma between, or none", "free")
    peak_flops: float | None = _arg(None, "FLOP/s of the device, for MFU; none: of a table, or measured", "free")
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
        self._check_together()

    def _check_together(self) -> None:
        """Raise ValueError for an argument that has no effect beside the others."""
        for first, second, both in (
            ("bf16", "fp16", self.bf16 and self.fp16),
            ("tf32", "matmul_precision", self.tf32 and self.matmul_precision != "default"),
            ("warmup_steps", "warmup_ratio", self.warmup_steps > 0 and self.warmup_ratio > 0),
            ("parallel 'fsdp'", "gradient_reduction", self.parallel == "fsdp" and self.gradient_reduction != "tree"),
            ("cuda_graph", "parallel 'fsdp'", self.cuda_graph and self.parallel == "fsdp"),
            ("cuda_graph", "torch_compile", self.cuda_graph and self.torch_compile),
            ("cuda_graph", "gradient_checkpointing", self.cuda_graph and self.gradient_checkpointing),
            ("cuda_graph", "packing", self.cuda_graph and self.packing),
        ):
            if both:
                raise ValueError(f"{first} and {second} are both given, but one excludes the other; leave one out")
        kind = self.lr_scheduler_type
        for name, schedules in (
            ("lr_power", ("polynomial",)),
            ("lr_decay_ratio", ("warmup_stable_decay",)),
            ("min_lr_ratio", ("linear", "cosine", "polynomial", "warmup_stable_decay")),
        ):
            if kind not in schedules and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} has no effect with lr_scheduler_type {kind!r}; it is for {', '.join(schedules)}"
                )
        if unknown := [name for name in report_names(self) if name not in REPORTS]:
            known = ", ".join(REPORTS)
            raise ValueError(f"report_to {unknown[0]!r} is not supported; it should be of {known}, or none")
        if self.eval_steps is None and (self.load_best_model_at_end or self.early_stopping_patience is not None):
            name = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{name} needs evaluations, but eval_steps is None; give eval_steps")
        if self.load_best_model_at_end and (self.save_steps == 0 or self.save_steps % self.eval_steps):  # type: ignore
            raise ValueError(
                f"load_best_model_at_end loads the checkpoint of an evaluated step, but save_steps is "
                f"{self.save_steps}, not a multiple of eval_steps {self.eval_steps}"
            )


_LIMITS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_steps save_total_limit",
     lambda value: value >= 1, "at least 1"),
    ("early_stopping_patience", lambda value: value >= 1, "at least 1"),
    ("max_time peak_flops lr_power", lambda value: 0 < value < math.inf, "positive and finite"),
    ("min_lr_ratio warmup_ratio", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("lr_decay_ratio", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("max_steps", lambda value: value >= 1 or value == -1, "at least 1, or -1 to obey num_train_epochs"),
    ("warmup_steps logging_steps save_steps", lambda value: value >= 0, "at least 0"),
    ("num_train_epochs learning_rate adam_epsilon", lambda value: 0 < value < math.inf, "positive and finite"),
    ("weight_decay max_grad_norm", lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    ("adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
]  # fmt: skip


def report_names(args: TrainingArguments) -> list[str]:
    """Return the names in report_to, without "none"."""
    return [name for part in args.report_to.split(",") if (name := part.strip()) not in ("", "none")]


def _plain_number(value: Any, kind: Any) -> Any:
    """Return NumPy's numbers, and whole numbers where a float is expected, as Python's int or float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # an int of 309 digits
    return int(value) if int in kinds and isinstance(value, numbers.Integral) else value


def lr_at(step: int, args: TrainingArguments, total_steps: int) -> float:
    """Return the learning rate of the update that follows `step` updates, for step = 0 ... total_steps - 1.

    Warmup rises in equal steps to args.learning_rate; the decay would reach min_lr_ratio of it at total_steps. So no
    update has a learning rate of 0, the first and the last included.
    """
    warmup = warmup_steps(args, total_steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    left = (total_steps - step) / (total_steps - warmup)  # 1 after warmup, 0 at the end
    if args.lr_scheduler_type == "constant":
        left = 1.0
    elif args.lr_scheduler_type == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    elif args.lr_scheduler_type == "polynomial":
        left = left**args.lr_power
    elif args.lr_scheduler_type == "warmup_stable_decay":  # Hu et al. 2024 (MiniCPM), section 4
        decay = min(max(1.0, args.lr_decay_ratio * total_steps), total_steps - warmup)
        left = min(1.0, (total_steps - step) / decay)
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * left if args.min_lr_ratio else left)


def warmup_steps(args: TrainingArguments, total_steps: int) -> int:
    """Return the number of steps in which the learning rate rises."""
    return args.warmup_steps or math.ceil(args.warmup_ratio * total_steps)


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
