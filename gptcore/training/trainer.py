"""Training any model that returns its loss, in a loop that can be read on one screen (`Trainer._loop`).

A run is a pure function of the model's initial weights, the arguments and the dataset: on a CPU, with the same number
of threads and the same versions, it gives the same bits each time, interrupted and resumed or not, evaluated or not.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gptcore import precision
from gptcore.config import IGNORED
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.data.datasets import epoch_order
from gptcore.files import absolute
from gptcore.modes import module_mode
from gptcore.training import arguments, checkpoint, resume
from gptcore.training.arguments import TrainingArguments, lr_at
from gptcore.training.callbacks import LogFile, ProgressLine, TrainerCallback
from gptcore.training.optim import AdamW
from gptcore.training.plan import plan
from gptcore.training.random_state import own_randomness, seed_everything
from gptcore.training.signals import TrainingInterrupted, stop_signals
from gptcore.training.state import NonFiniteError, StepResult, Sums, TrainerState, TrainOutput, UnreadSteps

__all__ = ["NonFiniteError", "TrainOutput", "Trainer", "TrainerState", "TrainingArguments", "TrainingInterrupted"]

Batch = dict[str, Any]
_epoch_order = functools.lru_cache(maxsize=1)(epoch_order)  # asked for at each step, new with each epoch


class Trainer:
    """Trains `model` on its device and in its dtype, and evaluates it.

    model: any module whose forward takes a batch as keyword arguments and returns an object with `loss`, the mean over
        the batch's targets. Where forward has an argument `return_logits`, it is given False.
    train_dataset, eval_dataset: anything with a length and integer indices. An attribute `fingerprint`, a string that
        changes with the content, lets a resumed run notice other data.
    data_collator: turns a list of examples into a batch, a dict of the model's arguments. Its default is
        DataCollatorForLanguageModeling(tokenizer).
    tokenizer: is saved with the model and in each checkpoint, by its save_pretrained.

    Micro-batches and evaluation batches are weighed by their number of targets: batch["num_targets"], which the
    collator may add and the model does not get; else model.count_targets(batch), if the model has it; else the number
    of labels that are not -100, from the second of each row on where labels have rows, as a language model shifts
    them. A step without a target updates nothing, and is counted in the log as `skipped_steps`.

    Steps do not cross the end of an epoch: the last step of an epoch has what is left, be it a smaller batch or fewer
    of them, and an epoch is ceil(examples / (batch size x accumulation)) steps.

    Attributes: state; last_step (loss, learning_rate, grad_norm and tokens_per_second of the last step, on a GPU of the
    last one that was read: results are read where something is logged, evaluated or saved, and each 100 steps).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        tokenizer: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None and not hasattr(dataset, "__len__"):
                raise TypeError(f"{name} is a {type(dataset).__name__}, expected something with a length and indices")
            if dataset is not None and len(dataset) == 0:
                raise ValueError(f"{name} holds 0 examples")
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.callbacks = [*([] if args.disable_tqdm else [ProgressLine()]), *callbacks]
        self.device = next(model.parameters()).device
        self.folder = absolute(args.output_dir)  # wherever a callback changes to
        dtype = torch.bfloat16 if args.bf16 else next(model.parameters()).dtype
        precision.warn_if_slow(dtype, self.device, "use float32: bf16=False (--no-bf16), or model.float()")
        self.state = TrainerState()
        self.last_step: dict[str, float] = {}
        self._newest: Path | None = None  # the checkpoint of this step
        self._fingerprint: str | None = None  # of train_dataset, from the first save on
        self._checked = False  # that batches are the same the second time

    @property
    def own_model(self) -> nn.Module:
        """Return the model without the wrapper of torch.compile; files use its parameter names."""
        inner = getattr(self.model, "_orig_mod", self.model)
        assert isinstance(inner, nn.Module)
        return inner

    @property
    def steps_per_epoch(self) -> int:
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return -(-len(self.train_dataset) // per_step)

    @property
    def total_steps(self) -> int:
        """Return the step at which training ends."""
        return arguments.total_steps(self.args, self.steps_per_epoch)

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> TrainOutput:
        """Train to the end and return the losses; save_model saves the result.

        resume_from_checkpoint: None or False starts at step 0. True resumes from the newest whole checkpoint in
        output_dir, with a warning for each damaged one that is passed over; a path resumes from that one.

        Nothing is written before every check has passed. Raises
            TrainingInterrupted  after SIGINT or SIGTERM, when the step is finished and a checkpoint is saved; a second
                signal stops at once, as without a trainer
            NonFiniteError  before an update by a loss or gradient that is not finite
            FileExistsError  if output_dir holds another run or a model, and overwrite_output_dir is False
            CheckpointError  if a checkpoint is damaged, does not fit or cannot be written, as on a full disk
        """
        self._check()
        with resume.claimed(self.folder), stop_signals() as signals, module_mode(self.model, training=True):
            self._start(resume_from_checkpoint)
            log = LogFile(self.folder / "log.jsonl", last_step=self.state.global_step)
            try:
                self._call("on_train_begin")
                self._loop(log, signals)
            finally:
                log.close()
                self._call("on_train_end")
                self.optimizer.zero_grad()
            if signals:  # during the last save, say
                raise TrainingInterrupted(self._newest or self._save_checkpoint(None))
        state, means = self.state, self.state.total.means()
        metrics = {"train_loss": means.pop("loss"), **means, "train_runtime": state.total.seconds, "epoch": state.epoch}
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    def _loop(self, log: LogFile, signals: list[int]) -> None:
        args, state, optimizer, unread = self.args, self.state, self.optimizer, self.unread
        for step in range(state.global_step, self.total_steps):
            unread.start()
            lr = lr_at(step, args, self.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The gradient of the mean over all targets of the step, however they are spread over its micro-batches
            micro_batches = self._micro_batches(step)
            counts = [self.count_targets(batch) for batch in micro_batches]
            targets, tokens = sum(counts), sum(map(count_tokens, micro_batches))
            loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
            optimizer.zero_grad()
            for batch, count in zip(micro_batches, counts, strict=True):
                if count > 0:
                    loss = self._loss(batch) * (count / targets)
                    torch.autograd.backward(loss)
                    loss_sum += loss.detach()

            # An update with the gradients' norm clipped, which the device skips unless loss and norm are finite
            grad_norm = optimizer.global_norm()
            if targets > 0:
                clip = clip_factor(grad_norm, args.max_grad_norm)
                optimizer.step(grad_scale=clip, found_inf=unread.check(loss_sum, grad_norm))
            else:
                self._skip(step + 1, tokens)
            unread.steps.append(StepResult(step + 1, tokens, targets, lr, loss_sum, grad_norm))

            due = functools.partial(self._due, step + 1)
            log_due, eval_due, save_due = due(args.logging_steps), due(args.eval_steps), due(args.save_steps)
            if unread.due() or log_due or eval_due or save_due or step + 1 == self.total_steps:
                self._read()  # waits for the device
            state.global_step, state.epoch = step + 1, (step + 1) / self.steps_per_epoch
            self._newest = None
            if targets > 0:
                self._call("on_step_end")

            entry = self._log_entry() if log_due else {}
            if eval_due:
                entry |= self.evaluate()
            if entry:
                entry = {"step": state.global_step, "epoch": state.epoch, **entry}
                log.append(entry)
                self._call("on_log", entry)

            interrupted = bool(signals)
            if interrupted or save_due:
                self._read()
                log.sync()
                path = self._save_checkpoint(entry.get("eval_loss"))
            if interrupted:
                raise TrainingInterrupted(path)

    def evaluate(self) -> dict[str, float]:
        """Return {"eval_loss": mean over all targets of eval_dataset, "perplexity": its exponential}.

        Runs in eval mode without gradients; random generators and modes of modules are afterwards as before.
        """
        if self.eval_dataset is None:
            raise ValueError("evaluate() needs an eval_dataset")
        size, targets = self.args.per_device_eval_batch_size, 0
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with own_randomness(self.args.seed), module_mode(self.model, training=False), torch.no_grad():
            for start in range(0, len(self.eval_dataset), size):
                batch = self._collate(self.eval_dataset, range(start, min(start + size, len(self.eval_dataset))))
                if count := self.count_targets(batch):
                    total, targets = total + self._loss(batch).double() * count, targets + count
        if targets == 0:
            raise ValueError("eval_dataset has not one label that counts")
        loss = total.item() / targets
        metrics = {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        self._call("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write the model and the tokenizer's files into a folder, by default args.output_dir.

        A model without save_pretrained is written as model.safetensors, its state_dict by its own names.
        """
        folder = absolute(output_dir) if output_dir else self.folder
        with checkpoint.exclusive(folder, nested=True):  # another process may be training into it
            if hasattr(self.own_model, "save_pretrained"):
                self.own_model.save_pretrained(folder)  # type: ignore[operator]
            else:
                checkpoint.save_weights(self.own_model, folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def plan(self) -> str:
        """Return what train() is about to do, in numbers."""
        return plan(self)

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return the number of targets that the loss of a batch is a mean over, by the rule in the class docstring."""
        if "num_targets" in batch:
            return int(batch["num_targets"])
        count = getattr(self.own_model, "count_targets", _count_shifted_labels)
        try:
            return int(count(batch))
        except KeyError as error:
            found = f"the data collator returned {sorted(batch)}"
            raise ValueError(
                f"{found}, but a loss needs {error.args[0]}, or num_targets to tell their number"
            ) from None

    # ---- parts of the above, in the order of their use

    def _check(self) -> None:
        """Raise ValueError or TypeError for arguments that do not fit each other, before any file is touched."""
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
        if self.tokenizer is not None and not hasattr(self.tokenizer, "save_pretrained"):
            kind = type(self.tokenizer).__name__
            raise TypeError(f"tokenizer is a {kind} without save_pretrained, which each checkpoint needs; leave it out")
        resume.check_model(self.own_model)
        if args.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps is {args.warmup_steps}, but the run has only {self.total_steps} steps")

    def _start(self, resume_from: bool | str | os.PathLike[str] | None) -> None:
        """Put state, optimizer and random generators at the first step to do, then delete a run to be overwritten."""
        path = None
        self.state, self.optimizer = TrainerState(), make_optimizer(self.model, self.args)
        self.unread, self.last_step = UnreadSteps(self.device), {}
        self._newest, self._fingerprint, self._checked = None, None, False
        if resume_from:
            path = resume.choose_checkpoint(self.folder, resume_from)
            state, saved = resume.read_state(path)
            resume.compare(path, saved, self._description(state.global_step), self.args)
        earlier = resume.earlier_run(self.folder, path, self.args.overwrite_output_dir)
        if path is not None:
            checkpoint.load_into(path, self.own_model, self.optimizer)
            self.state = state
        else:
            seed_everything(self.args.seed)
        resume.check_room(self.folder, self.own_model, self.args.save_steps > 0)
        if self.tokenizer is not None:
            resume.check_tokenizer(self.folder, self.tokenizer)
        resume.delete_run(earlier)
        self._rotate()  # which a kill may have prevented

    def _description(self, step: int) -> resume.Description:
        if self._fingerprint is None:
            with own_randomness(self.args.seed):
                collate = functools.partial(self._collate, self.train_dataset)
                self._fingerprint = resume.fingerprint(self.train_dataset, collate)
        data = {
            "examples": len(self.train_dataset),
            "fingerprint": self._fingerprint,
            "sha256 of the last batches": self._digest(step - 1),
        }
        return resume.describe_run(self.args, self.own_model, data, self.total_steps, self.device)

    def _digest(self, step: int) -> str:
        """Return the SHA-256 of the batches of a step; random generators are afterwards as before."""
        with own_randomness(self.args.seed):
            return resume.digest(self._micro_batches(step))

    def _check_repeatable(self, step: int) -> None:
        """Warn if collating the batches of a step twice gives different batches."""
        if self._digest(step) != self._digest(step):
            warnings.warn(
                "train_dataset or data_collator returns different batches for the same indices, as with a random "
                "generator of its own: this run's checkpoints cannot be resumed. Use the global generators of PyTorch, "
                "NumPy or Python, whose state checkpoints hold",
                stacklevel=4,
            )

    def _micro_batches(self, step: int) -> list[Batch]:
        """Return the batches of one update, a pure function of the step, the seed and the dataset."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = self.args.per_device_train_batch_size
        count = size * self.args.gradient_accumulation_steps
        order = _epoch_order(len(self.train_dataset), self.args.seed, epoch)[step_in_epoch * count :][:count]
        return [self._collate(self.train_dataset, order[i : i + size].tolist()) for i in range(0, len(order), size)]

    def _collate(self, dataset: Any, indices: Sequence[int]) -> Batch:
        return self.data_collator([dataset[index] for index in indices])

    def first_batch(self) -> Batch:
        """Return the first example as a batch; random generators are afterwards as before."""
        with own_randomness(self.args.seed):
            return self._collate(self.train_dataset, [0])

    def _loss(self, batch: Batch) -> Tensor:
        """Return the model's mean loss over the targets of a batch, a scalar in float32 or float64."""
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name != "num_targets"
        }
        if _takes(type(self.own_model).forward, "return_logits"):
            inputs["return_logits"] = False
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            loss = getattr(output := self.model(**inputs), "loss", None)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            found = f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"loss {loss!r}"
            raise TypeError(f"the model returned a {type(output).__name__} with {found}, expected a scalar tensor")
        return loss.float() if loss.dtype.itemsize == 2 else loss

    def _read(self) -> None:
        """Add up the results of the steps since the last call. Raises NonFiniteError for the first bad one."""
        for result, sums, loss, grad_norm in self.unread.read():
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._stop_at_non_finite(result.step, loss, grad_norm)
            self.state.total, self.state.window = self.state.total + sums, self.state.window + sums
            self.last_step = {**sums.means(), "learning_rate": result.learning_rate, "grad_norm": grad_norm}

    def _stop_at_non_finite(self, step: int, loss: float, grad_norm: float) -> NoReturn:
        self.state.global_step, self.state.epoch = step - 1, (step - 1) / self.steps_per_epoch
        saved = [path for path in checkpoint.list_checkpoints(self.folder) if checkpoint.is_ours(path)]
        advice = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        named = list(self.own_model.named_parameters())
        bad = [f"parameter {name}" for name, parameter in named if not parameter.isfinite().all()]
        bad += [] if math.isfinite(loss) else ["loss"]
        gradients = [(name, parameter.grad) for name, parameter in named if parameter.grad is not None]
        bad += [f"gradient of {name}" for name, gradient in gradients if not gradient.isfinite().all()]
        tensor = [*bad, "gradient norm"][0]
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the first tensor that is not finite "
            f"is the {tensor}. The weights are those of step {step - 1}; {advice}",
            step,
            tensor,
        )

    def _skip(self, step: int, tokens: int) -> None:
        """Count a step without a target. Raises ValueError when an epoch, or all of a shorter run, had none."""
        self.state.skipped_steps += 1
        if self.state.skipped_steps == step >= min(self.steps_per_epoch, self.total_steps):
            raise ValueError(f"step {step} has {tokens} tokens, but not one label that counts; nor has any step before")

    def _log_entry(self) -> dict[str, Any]:
        """Return the means since the last log entry, and learning rate and gradient norm of the last step."""
        numbers, self.state.window = self.last_step | self.state.window.means(), Sums()
        entry: dict[str, Any] = {name: value for name, value in numbers.items() if not math.isnan(value)}
        if self.state.skipped_steps:
            entry["skipped_steps"] = self.state.skipped_steps
        return entry

    def _due(self, step: int, every: int | None) -> bool:
        """Return whether `step` is the last or a multiple of `every`; False for None and 0."""
        return bool(every) and (step % every == 0 or step == self.total_steps)  # type: ignore[operator]

    def _save_checkpoint(self, eval_loss: float | None) -> Path:
        state = self.state
        path = self.folder / f"checkpoint-{state.global_step}"
        if (
            eval_loss is not None
            and math.isfinite(eval_loss)
            and (state.best_metric is None or eval_loss < state.best_metric)
        ):
            state.best_metric, state.best_step = eval_loss, state.global_step
        if not self._checked:
            self._check_repeatable(state.global_step - 1)
            self._checked = True
        content = {"state": dataclasses.asdict(state), **self._description(state.global_step)}
        checkpoint.save_checkpoint(path, self.own_model, self.optimizer, content, self.tokenizer)
        self._rotate()
        self._newest = path
        self._call("on_save", path)
        return path

    def _rotate(self) -> None:
        if (limit := self.args.save_total_limit) is not None:
            checkpoint.rotate_checkpoints(self.folder, limit, self.state.global_step, self.state.best_step)

    def _call(self, event: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)


def make_optimizer(model: nn.Module, args: TrainingArguments) -> AdamW:
    """Return AdamW (Loshchilov & Hutter 2019) over the parameters with requires_grad, a tied one once.

    Matrices decay, embeddings included; biases and the weights of norms do not, as in nanoGPT.
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


def clip_factor(grad_norm: Tensor, max_grad_norm: float) -> Tensor | float:
    """Return the factor that limits gradients of this norm, as in torch.nn.utils.clip_grad_norm_; 0: no limit."""
    return (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0) if max_grad_norm > 0 else 1.0


def _count_shifted_labels(batch: Mapping[str, Any]) -> int:
    labels = batch["labels"]
    return int(((labels[:, 1:] if labels.dim() > 1 else labels) != IGNORED).sum())


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of elements of input_ids, padding included, or else of the largest tensor of a batch."""
    if "input_ids" in batch:
        return int(batch["input_ids"].numel())
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)


@functools.lru_cache(maxsize=8)
def _takes(forward: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(forward).parameters
