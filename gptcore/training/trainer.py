"""Training a GPT: the arguments, the schedule, and a loop that can be read on one screen (`Trainer._loop`).

A run is a pure function of the model's initial weights, the arguments and the dataset: on a CPU, with the same number
of threads and the same versions, it gives the same bits each time, interrupted and resumed or not, evaluated or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from gptcore import _C, ops
from gptcore.config import IGNORED
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.data.datasets import epoch_order
from gptcore.files import absolute, from_json
from gptcore.model import GPT, targets_of
from gptcore.modes import module_mode
from gptcore.training import checkpoint
from gptcore.training.callbacks import LogFile, ProgressLine, TrainerCallback
from gptcore.training.checkpoint import CheckpointError
from gptcore.training.optim import AdamW
from gptcore.training.random_state import own_randomness, seed_everything

Batch = dict[str, Tensor]
_epoch_order = functools.lru_cache(maxsize=1)(epoch_order)  # asked for at each step, new with each epoch


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped training; all of it is in `checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = path
        super().__init__(f"interrupted; go on with trainer.train(resume_from_checkpoint={str(path)!r})")


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of step `step` is NaN or infinite, `tensor` first; the weights were not updated."""

    def __init__(self, message: str, step: int, tensor: str) -> None:
        self.step, self.tensor = step, tensor
        super().__init__(message)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _arg(default: Any, help: str, resume: Literal["same", "warn", "free"] = "warn") -> Any:
    """A field with its line of help, and what it means if a resumed run has another value than the checkpoint:

    "same": an error, because the position in the data would mean something else; "warn": a warning, because the run is
    no longer the one that began; "free": nothing.
    """
    return field(default=default, metadata={"help": help, "resume": resume})


@dataclass
class TrainingArguments:
    """Names and defaults of Hugging Face's class of this name. Raises TypeError or ValueError, naming the argument."""

    output_dir: str = _arg(dataclasses.MISSING, "folder for checkpoints, log.jsonl and the model", "free")
    overwrite_output_dir: bool = _arg(False, "delete checkpoints and log of an earlier run in output_dir", "free")
    num_train_epochs: float = _arg(3.0, "passes over the training data, unless max_steps says otherwise", "free")
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
    logging_steps: int = _arg(500, "steps between lines in log.jsonl, the last step has one too; 0: none", "free")
    eval_steps: int | None = _arg(None, "steps between evaluations, the last step has one too; none: never", "free")
    save_steps: int = _arg(500, "steps between checkpoints, the last step has one too; 0: if interrupted", "free")
    save_total_limit: int | None = _arg(None, "checkpoints to keep, newest and best always; none: all", "free")
    seed: int = _arg(42, "of the order of the data and of dropout", "same")
    bf16: bool = _arg(False, "compute in bfloat16 where autocast does; weights and optimizer stay float32")
    disable_tqdm: bool = _arg(False, "print nothing while training: no plan, no progress", "free")

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str | os.PathLike) or not os.fspath(self.output_dir):
            raise TypeError(f"output_dir should be the path of a folder, not {self.output_dir!r}")
        self.output_dir = os.fspath(self.output_dir)
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is float and type(value) is int:
                setattr(self, name, float(value))
            elif get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise ValueError(f"{name} {value!r} is not supported; it should be one of {get_args(kind)}")
            elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{name} should be of type {getattr(kind, '__name__', kind)}, not {value!r}")
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


def lr_at(step: int, args: TrainingArguments, total_steps: int) -> float:
    """The learning rate of the update that follows `step` updates, for step = 0 ... total_steps - 1.

    Rises in equal steps to args.learning_rate, which update `warmup_steps` has, and falls to what would be 0 at
    total_steps. No update has a learning rate of 0, the first and the last included.
    """
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / (args.warmup_steps + 1)
    if args.lr_scheduler_type == "constant":
        return args.learning_rate
    left = (total_steps - step) / (total_steps - args.warmup_steps)  # 1 after warmup, 0 at the end
    return args.learning_rate * (left if args.lr_scheduler_type == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


# ---- the trainer -----------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """What is added up over steps, and the means that follow."""

    tokens: int = 0  # of input, padding included
    labels: int = 0  # that the loss is a mean over
    loss: float = 0.0  # over those labels
    seconds: float = 0.0  # in steps: without evaluations and saves

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        return {"loss": self.loss / max(1, self.labels), "tokens_per_second": self.tokens / max(1e-9, self.seconds)}


@dataclass
class TrainerState:
    """All that the loop carries from step to step beside weights, optimizer and random generators."""

    global_step: int = 0  # updates done
    epoch: float = 0.0
    total: Sums = field(default_factory=Sums)  # since step 0
    window: Sums = field(default_factory=Sums)  # since the last line in the log
    best_metric: float | None = None  # the lowest eval_loss of those that have a checkpoint of the same step
    best_step: int | None = None

    @classmethod
    def from_checkpoint(cls, path: Path, saved: Mapping[str, Any]) -> TrainerState:
        """Return the state in what `checkpoint.read_state(path)` returned. Raises CheckpointError if it is damaged."""
        where = path / "trainer_state.json"
        try:
            state = from_json(cls, saved.get("state"), where)
            if state.global_step < 1 or checkpoint.checkpoint_step(path) not in (-1, state.global_step):  # -1: renamed
                raise ValueError(f"{where} is of step {state.global_step}, but the folder is {path.name}")
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        return state


class TrainOutput(NamedTuple):
    """What training returns: the training loss is the mean over all labels since step 0."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer:
    """Trains `model` where it is (device and dtype are yours to choose) and evaluates it.

    train_dataset, eval_dataset: anything with a length and integer indices; data_collator turns a list of examples into
    the model's keyword arguments: input_ids (B, T), labels (B, T) and what else it takes. Its default is
    DataCollatorForLanguageModeling(tokenizer). The tokenizer, if given, is saved with the model. Steps do not cross the
    end of an epoch: the last step of an epoch has what is left, be it a smaller batch or fewer of them, and an epoch is
    ceil(examples / (batch size x accumulation)) steps.
    """

    def __init__(
        self,
        model: GPT,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        tokenizer: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None and len(dataset) == 0:
                raise ValueError(f"{name} holds 0 examples")
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.callbacks = [*([] if args.disable_tqdm else [ProgressLine()]), *callbacks]
        self.device = next(model.parameters()).device
        self.state = TrainerState()
        self.last_step: dict[str, float] = {}  # loss, learning_rate, grad_norm and tokens_per_second of the last step

    @property
    def steps_per_epoch(self) -> int:
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return math.ceil(len(self.train_dataset) / per_step)

    @property
    def total_steps(self) -> int:
        """The step at which training ends."""
        args = self.args
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch)

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> TrainOutput:
        """Train to the end, and return; saving the result is `save_model`'s.

        resume_from_checkpoint: None or False starts at step 0. True goes on from the newest whole checkpoint in
        output_dir, with a warning for each damaged one that is passed over; a path goes on from that one.

        Raises TrainingInterrupted after SIGINT or SIGTERM, when the step is finished and a checkpoint saved (a second
        signal does what it does without a trainer: stops at once); NonFiniteError before an update by a loss or
        gradient that is not finite; FileExistsError if output_dir holds an earlier run and is neither resumed nor to be
        overwritten; CheckpointError if a checkpoint is damaged, does not fit or cannot be written, as on a full disk:
        training stops then, as going on would spend compute on what cannot be kept.
        """
        args, model = self.args, self.model
        if self.train_dataset is None:
            raise ValueError("train() needs a train_dataset")
        if args.eval_steps is not None and self.eval_dataset is None:
            raise ValueError(f"eval_steps is {args.eval_steps}, but there is no eval_dataset")
        wrong = {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}
        if args.bf16 and wrong:
            raise ValueError(
                f"bf16=True computes in bfloat16 with float32 weights, but the model has {', '.join(wrong)}; "
                "with bf16=False it is trained in its own dtype, and AdamW keeps the weights in float32 beside it"
            )
        if args.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps is {args.warmup_steps}, but the run has only {self.total_steps} steps")
        with checkpoint.exclusive(args.output_dir), stop_signals() as signals, module_mode(model, training=True):
            self._start(resume_from_checkpoint)
            log = LogFile(Path(args.output_dir, "log.jsonl"), last_step=self.state.global_step)
            try:
                self._call("on_train_begin")
                self._loop(log, signals)
            finally:
                log.close()
                self._call("on_train_end")
                self.optimizer.zero_grad()
        state, means = self.state, self.state.total.means()
        metrics = {"train_loss": means.pop("loss"), **means, "train_runtime": state.total.seconds, "epoch": state.epoch}
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    def _loop(self, log: LogFile, signals: list[int]) -> None:
        args, state, optimizer = self.args, self.state, self.optimizer
        for step in range(state.global_step, self.total_steps):
            started = time.perf_counter()
            lr = lr_at(step, args, self.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The mean over all labels of the step, however they are spread over the micro-batches
            micro_batches = self._micro_batches(step)
            counts = [count_labels(batch) for batch in micro_batches]
            labels, tokens = sum(counts), sum(batch["input_ids"].numel() for batch in micro_batches)
            if labels == 0:
                raise ValueError(f"step {step + 1} has {tokens} tokens, but not one label that counts")
            optimizer.zero_grad()
            loss_sum = torch.zeros((), device=self.device)
            for batch, count in zip(micro_batches, counts, strict=True):
                loss = self._loss(batch)
                torch.autograd.backward(loss * (count / labels))
                loss_sum += loss.detach() * (count / labels)

            grad_norm = optimizer.grad_norm()
            self._check_finite(step + 1, loss_sum, grad_norm)
            clip = min(1.0, args.max_grad_norm / (grad_norm + 1e-6)) if args.max_grad_norm > 0 else 1.0
            optimizer.step(grad_scale=clip)

            done = Sums(tokens, labels, loss_sum.item() * labels, time.perf_counter() - started)
            state.global_step, state.epoch = step + 1, (step + 1) / self.steps_per_epoch
            state.total, state.window = state.total + done, state.window + done
            self.last_step = {**done.means(), "learning_rate": lr, "grad_norm": grad_norm}
            self._call("on_step_end")

            entry: dict[str, Any] = {}
            if self._due(args.logging_steps):
                entry, state.window = self.last_step | state.window.means(), Sums()
            if self._due(args.eval_steps):
                entry |= self.evaluate()
            if entry:
                entry = {"step": state.global_step, "epoch": state.epoch, **entry}
                log.append(entry)
                self._call("on_log", entry)

            interrupted = bool(signals)
            if interrupted or self._due(args.save_steps):
                log.sync()
                path = self._save_checkpoint(entry.get("eval_loss"))
            if interrupted:
                raise TrainingInterrupted(path)

    def evaluate(self) -> dict[str, float]:
        """{"eval_loss": mean over all labels of eval_dataset, "perplexity": its exponential}.

        In eval mode, without gradients, and without a trace in the random generators or the modes of the modules.
        """
        if self.eval_dataset is None:
            raise ValueError("evaluate() needs an eval_dataset")
        size, total, labels = self.args.per_device_eval_batch_size, 0.0, 0
        with own_randomness(self.args.seed), module_mode(self.model, training=False), torch.no_grad():
            for start in range(0, len(self.eval_dataset), size):
                batch = self._collate(self.eval_dataset, range(start, min(start + size, len(self.eval_dataset))))
                if count := count_labels(batch):
                    total, labels = total + self._loss(batch).item() * count, labels + count
        if labels == 0:
            raise ValueError("eval_dataset has not one label that counts")
        loss = total / labels
        metrics = {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        self._call("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write config.json, model.safetensors and the tokenizer's files into a folder, by default args.output_dir."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def plan(self) -> str:
        """What train() is about to do, in numbers."""
        args, config = self.args, self.model.config
        with own_randomness(args.seed):
            length = self._collate(self.train_dataset, [0])["input_ids"].shape[1]
        decayed, undecayed = (sum(p.numel() for p in group["params"]) for group in self.optimizer.param_groups)
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * length
        flops, steps = flops_per_token(self.model, length), self.total_steps - self.state.global_step
        start = f", of which {self.state.global_step:,} are done" if self.state.global_step else ""
        dtype = "bfloat16 by autocast, weights and optimizer float32 (bf16=True)"
        if not args.bf16:
            own = next(self.model.parameters()).dtype
            dtype = f"{str(own).removeprefix('torch.')}, as the model is (bf16=False)"
            if own.itemsize == 2:
                dtype += "; AdamW keeps the weights in float32 beside it"
        clipped = f"gradient norm clipped to {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "no clipping"
        return "\n".join([
            f"model       {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
            f"vocabulary {config.vocab_size:,}",
            f"parameters  {decayed + undecayed:,}: {decayed:,} in matrices (weight decay {args.weight_decay:g}), "
            f"{undecayed:,} in biases and norms (no decay)",
            f"data        {len(self.train_dataset):,} examples of {length:,} tokens, if all are like the first",
            f"steps       {self.total_steps:,}{start}; {self.steps_per_epoch:,} an epoch; {per_step:,} tokens each "
            f"({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {length})",
            f"compute     {flops:,} FLOPs per token, {flops * per_step * steps:.2e} to do",
            f"optimizer   AdamW, learning rate {args.learning_rate:g}, {args.lr_scheduler_type}, "
            f"{args.warmup_steps} steps of warmup, {clipped}",
            f"dtype       {dtype}",
            f"device      {self.device}, {torch.get_num_threads()} threads",
            f"kernels     {': '.join(ops.chosen('attention', next(self.model.parameters())))}",
        ])  # fmt: skip

    # ---- parts of the above, in the order of their use

    def _start(self, resume_from: bool | str | os.PathLike[str] | None) -> None:
        """Make state, optimizer and random generators as they are before the first step to do."""
        folder = Path(self.args.output_dir)
        self.state, self.optimizer = TrainerState(), make_optimizer(self.model, self.args)
        if resume_from:
            path = checkpoint.newest_checkpoint(folder) if resume_from is True else Path(resume_from)
            checkpoint.verify_checkpoint(path)
            in_folder = absolute(path).parent.resolve() == folder.resolve()  # a link there is of this run, too
            if in_folder and path.name != (newest := checkpoint.newest_checkpoint(folder)).name:
                raise CheckpointError(
                    f"{path} is not the newest checkpoint of its run, {newest} is whole: two courses of one run would "
                    "be mixed up; choose another output_dir, or delete the newer checkpoints"
                )
            saved = checkpoint.read_state(path)
            state = TrainerState.from_checkpoint(path, saved)
            checkpoint.check_unobstructed(folder, state.global_step if in_folder else -1)
            self._compare(path, saved)
            checkpoint.load_into(path, self.model, self.optimizer)
            self.state = state
            if (limit := self.args.save_total_limit) is not None and in_folder:  # a kill may have prevented it
                checkpoint.rotate_checkpoints(folder, limit, state.global_step, state.best_step)
            return
        earlier = [*checkpoint.list_checkpoints(folder), *folder.glob("log.jsonl")]
        checkpoint.check_unobstructed(folder, -1)
        if earlier and not self.args.overwrite_output_dir:
            raise FileExistsError(
                f"{folder} holds an earlier run ({', '.join(path.name for path in earlier[:4])}): go on from it with "
                "resume_from_checkpoint=True, delete it with overwrite_output_dir=True, or choose another output_dir"
            )
        (folder / "log.jsonl").unlink(missing_ok=True)
        for path in earlier:
            if path.is_dir():
                checkpoint.remove_checkpoint(path)
        seed_everything(self.args.seed)

    def _compare(self, path: Path, saved: dict[str, Any]) -> None:
        """CheckpointError for what makes going on meaningless; one warning for what else changes the run's course."""
        rules = {field.name: field.metadata["resume"] for field in dataclasses.fields(TrainingArguments)}
        now = self._description(saved["state"]["global_step"])
        rules |= dict.fromkeys(now["data"], "same")
        if self.args.lr_scheduler_type == "constant":
            rules["total_steps"] = "free"
        before, after = ({name: value for part in now for name, value in d.get(part, {}).items()} for d in (saved, now))
        changes: dict[str, list[str]] = {"same": [], "warn": [], "free": []}
        for name in before | after:
            if before.get(name) != after.get(name):
                changes[rules.get(name, "warn")].append(f"{name} {before.get(name)!r} -> {after.get(name)!r}")
        if changes["same"]:
            raise CheckpointError(f"{path} cannot be resumed with other data or batches: {'; '.join(changes['same'])}")
        if changes["warn"]:
            text = f"from {path} the run takes another course than it would have: {'; '.join(changes['warn'])}"
            warnings.warn(text, stacklevel=4)

    def _description(self, step: int) -> dict[str, dict[str, Any]]:
        """What decides the course of a run after `step` updates, beside the state: stored, and compared on resuming."""
        with own_randomness(self.args.seed):  # the last batches stand for all of the data and the collator
            batches = [batch[key].numpy().tobytes() for batch in self._micro_batches(step - 1) for key in sorted(batch)]
            digest = hashlib.sha256(b"".join(batches)).hexdigest()
        return {
            "args": asdict(self.args),
            "data": {"examples": len(self.train_dataset), "sha256 of the last batches": digest},
            "schedule": {"total_steps": self.total_steps},
            "model": self.model.config.to_dict(),
            "environment": {
                "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
                "device": str(self.device), "threads": torch.get_num_threads(),
                "cpu": f"{torch.backends.cpu.get_cpu_capability()}, kernels {_C.cpu_isa()}",
                "backend": ops.chosen("attention", next(self.model.parameters()))[0],
            },
        }  # fmt: skip

    def _micro_batches(self, step: int) -> list[Batch]:
        """The batches of one update: a pure function of the step, the seed and the dataset."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = self.args.per_device_train_batch_size
        count = size * self.args.gradient_accumulation_steps
        order = _epoch_order(len(self.train_dataset), self.args.seed, epoch)[step_in_epoch * count :][:count]
        return [self._collate(self.train_dataset, order[i : i + size].tolist()) for i in range(0, len(order), size)]

    def _collate(self, dataset: Any, indices: Sequence[int]) -> Batch:
        batch = self.data_collator([dataset[index] for index in indices])
        if "labels" not in batch:
            raise ValueError(f"the data collator returned {sorted(batch)}, but a loss needs labels")
        return batch

    def _loss(self, batch: Batch) -> Tensor:
        """The model's mean loss over the labels of a batch, a float32 scalar."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
            loss: Tensor = self.model(**inputs, return_logits=False).loss
        return loss

    def _check_finite(self, step: int, loss: Tensor, grad_norm: float) -> None:
        if torch.isfinite(loss) and math.isfinite(grad_norm):
            return
        saved = [path for path in checkpoint.list_checkpoints(self.args.output_dir) if checkpoint.is_ours(path)]
        advice = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        named = list(self.model.named_parameters())
        tensors = {f"parameter {name}": parameter.detach() for name, parameter in named} | {"loss": loss}
        tensors |= {f"gradient of {name}": parameter.grad for name, parameter in named if parameter.grad is not None}
        tensors |= {"gradient norm": torch.tensor(grad_norm)}
        tensor = next(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
        raise NonFiniteError(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm}; the first tensor that is not finite "
            f"is the {tensor}. The weights are those of step {step - 1}; {advice}",
            step,
            tensor,
        )

    def _due(self, every: int | None) -> bool:
        """Whether something that is done every so many steps, and after the last, is due; never for None and 0."""
        step = self.state.global_step
        return bool(every) and (step % every == 0 or step == self.total_steps)  # type: ignore[operator]

    def _save_checkpoint(self, eval_loss: float | None) -> Path:
        args, state, folder = self.args, self.state, Path(self.args.output_dir)
        path = folder / f"checkpoint-{state.global_step}"
        if (
            eval_loss is not None
            and math.isfinite(eval_loss)
            and (state.best_metric is None or eval_loss < state.best_metric)
        ):
            state.best_metric, state.best_step = eval_loss, state.global_step
        content = {"state": asdict(state), **self._description(state.global_step)}
        checkpoint.save_checkpoint(path, self.model, self.optimizer, content, self.tokenizer)
        if args.save_total_limit is not None:
            checkpoint.rotate_checkpoints(folder, args.save_total_limit, state.global_step, state.best_step)
        self._call("on_save", path)
        return path

    def _call(self, event: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)


def make_optimizer(model: nn.Module, args: TrainingArguments) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices only, embeddings included, as GPT-2's and nanoGPT's does.

    A tied parameter is in it once. Biases and the weights of norms, which have one dimension, do not decay.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    assert len({id(parameter) for parameter in [*matrices, *vectors]}) == len(trained) == len(matrices) + len(vectors)
    if not trained:
        raise ValueError("the model has no parameter with requires_grad, so there is nothing to train")
    return AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
    )  # fmt: skip


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """How many labels GPT's loss of a batch is a mean over: not ignored, not padding, not the first in a document."""
    targets = targets_of(batch["labels"], batch.get("attention_mask"), batch.get("cu_seqlens"))
    return int((targets != IGNORED).sum())


def flops_per_token(model: GPT, length: int) -> int:
    """FLOPs of forward and backward for one token in a sequence of `length`, as GPT.estimate_flops counts them."""
    return model.estimate_flops(length, backward=True) // length


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list into which the first SIGINT or SIGTERM goes instead of taking effect; the second one has its old effect.

    Only in the main thread, the only one that Python lets handle signals; in others the list stays empty.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: set by C code
        previous.clear()

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        # os.write, because a handler may run in the middle of another print
        os.write(2, b"\nfinishing this step, then saving a checkpoint; once more stops at once, without saving\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
                previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
