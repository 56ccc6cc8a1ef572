"""Training any model that returns its loss, in a loop that can be read on one screen (`Trainer._loop`).

A run is a pure function of the model's initial weights, the arguments and the dataset: on a CPU, with the same number
of threads and the same versions, it gives the same bits each time, interrupted and resumed or not, evaluated or not,
and with any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptcore import precision
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.files import absolute
from gptcore.lora.adapters import is_unmerged
from gptcore.lora.files import save_adapter
from gptcore.modes import module_mode
from gptcore.training import arguments, checkpoint, distributed, estimate, graph, resume
from gptcore.training.arguments import TrainingArguments, lr_at
from gptcore.training.batches import Batch, Batches, MicroBatch, count_padding, count_targets, count_tokens, move
from gptcore.training.callbacks import LogFile, ProgressLine, TrainerCallback
from gptcore.training.evaluation import evaluate
from gptcore.training.gradients import GradientSum, check_shares
from gptcore.training.mixed_precision import MixedPrecision
from gptcore.training.nonfinite import count_overflow, stop_at_non_finite
from gptcore.training.optim import clip_factor, make_optimizer
from gptcore.training.plan import flops_of, plan
from gptcore.training.random_state import keyed, random_state, seed_everything, set_random_state
from gptcore.training.recompute import blocks_of, recomputed_blocks
from gptcore.training.reports import make_reports
from gptcore.training.sharding import ShardedGradient, Shards, shard
from gptcore.training.signals import TrainingInterrupted, stop_signals
from gptcore.training.state import NonFiniteError, StepResult, Sums, TrainerState, TrainOutput, UnreadSteps
from gptcore.training.stopping import INTERRUPT, Stopping

__all__ = ["NonFiniteError", "TrainOutput", "Trainer", "TrainerState", "TrainingArguments", "TrainingInterrupted"]


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

    Under torchrun the micro-batches of a step are spread over the processes. All of them make the same calls; the one
    of rank 0 alone writes files and prints. See gradient_reduction and parallel of TrainingArguments; with parallel
    "fsdp" the trainer shards the model, whose weights are those of rank 0.

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
        compiled: Any = torch.compile(model) if args.torch_compile and args.parallel == "data" else model
        self.model, self.args, self.tokenizer = compiled, args, tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.device = next(model.parameters()).device
        self.processes = distributed.join(self.device)
        self.shards: Shards | None = None
        if args.parallel == "fsdp":
            shard(self.own_model, args, self.processes, self.device)
        shows = self.processes.rank == 0 and not args.disable_tqdm
        reports = make_reports(args) if self.processes.rank == 0 else []
        self.callbacks = [*([ProgressLine()] if shows else []), *reports, *callbacks]
        self.folder = absolute(args.output_dir)  # wherever a callback changes to
        self.precision = MixedPrecision(args, self.device)
        dtype = self.precision.dtype or next(model.parameters()).dtype
        precision.warn_if_slow(dtype, self.device, "use float32: no bf16 and no fp16, or model.float()")
        self.state = TrainerState()
        self.last_step: dict[str, float] = {}
        self._batches: Batches | None = None
        self._newest: Path | None = None  # the checkpoint of this step
        self._checked = False  # that batches are the same the second time
        self.last_overflow = 0  # the last step whose gradient overflowed float16

    @property
    def own_model(self) -> nn.Module:
        """Return the model without the wrapper of torch.compile; files use its parameter names."""
        inner = getattr(self.model, "_orig_mod", self.model)
        assert isinstance(inner, nn.Module)
        return inner

    @property
    def batches(self) -> Batches:
        made = self._batches
        if made is None or made.dataset is not self.train_dataset or made.collator is not self.data_collator:
            self._batches = made = Batches(self.train_dataset, self.data_collator, self.args)
        return made

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

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
            ProcessGroupError  if another process of the run fails, or differs from that of rank 0

        A run that torchrun --max-restarts has started anew resumes by itself.
        """
        self._check()
        recomputed = recomputed_blocks(self.own_model) if self.args.gradient_checkpointing else contextlib.nullcontext()
        ended = self.processes.naming_ended() if self.args.parallel == "fsdp" else contextlib.nullcontext()
        with ended, self._claimed(), stop_signals() as signals, module_mode(self.model, training=True), recomputed:
            self._start(resume_from_checkpoint)
            log = LogFile(self.folder / "log.jsonl", self.state.global_step) if self.processes.rank == 0 else None
            try:
                self._call("on_train_begin")
                self._loop(log, signals)
            finally:
                if log is not None:
                    log.close()
                self._call("on_train_end")
                self.optimizer.zero_grad()
            if any(stop for (stop,) in self.processes.gather([bool(signals)])):  # during the last save, say
                raise TrainingInterrupted(self._newest or self._save_checkpoint({}))
            if self.args.load_best_model_at_end:
                self._load_best()
        state, means = self.state, self.state.total.means()
        metrics = {"train_loss": means.pop("loss"), **means, "train_runtime": state.total.seconds, "epoch": state.epoch}
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    def _loop(self, log: LogFile | None, signals: list[int]) -> None:
        args, state, optimizer, unread, gradients = self.args, self.state, self.optimizer, self.unread, self.gradients
        scaler, stopping = self.precision.scaler, self.stopping  # the former does nothing without fp16
        first, following = self.gradients.block.start, self._prepare(state.global_step)
        for step in range(state.global_step, stopping.end(self.total_steps)):
            unread.start()
            lr = lr_at(step - state.overflow_steps, args, self.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The gradient of the mean over all targets of the step, however they are spread over its micro-batches
            micro_batches = following
            targets, tokens, padding = self._add_up(micro_batches)
            gradients.clear()
            with self.precision.kept_casts():
                for index, batch in enumerate(micro_batches, start=first):
                    loss = None
                    if batch.targets > 0 or gradients.in_step:
                        seed_everything(keyed(args.seed, step, index, 1))  # dropout, with any number of processes
                        loss = self.compute(batch.inputs, batch.targets / max(1, targets))
                    gradients.add(loss)
            loss_sum, stop = gradients.finish(stopping.wish(signals), self.device)

            # An update with the gradients' norm clipped, which the device skips unless loss and norm are finite
            if targets > 0:
                scaler.unscale_(optimizer)
                grad_norm = optimizer.global_norm()
                clip = clip_factor(grad_norm, args.max_grad_norm)
                optimizer.step(grad_scale=clip, found_inf=unread.check(loss_sum, grad_norm))
                scaler.update()
            else:
                grad_norm = optimizer.global_norm()
                self._skip(step + 1, tokens)
            unread.steps.append(StepResult(step + 1, tokens, padding, targets, lr, loss_sum, grad_norm))
            following = self._prepare(step + 1)  # while the device computes

            due = functools.partial(self._due, step + 1)
            log_due, eval_due, save_due = due(args.logging_steps), due(args.eval_steps), due(args.save_steps)
            if unread.due() or log_due or eval_due or save_due or step + 1 == self.total_steps:
                self._read()  # waits for the device
            state.global_step, state.epoch = step + 1, (step + 1) / self.steps_per_epoch
            self._newest = None
            seed_everything(keyed(args.seed, step + 1, 0, 2))  # the generators of a checkpoint, on any rank
            if targets > 0 and self.last_overflow != step + 1:
                self._call("on_step_end")

            entry, patience = self._log_entry() if log_due else {}, 0
            if eval_due:
                metrics = self.evaluate()
                entry |= metrics
                patience = stopping.judge(metrics)
            if entry:
                entry = {"step": state.global_step, "epoch": state.epoch, **entry}
                if log is not None:
                    log.append(entry)
                self._call("on_log", entry)

            if self.processes.count == 1:
                stop = stopping.wish(signals)  # at once; processes agree on it during the step
            stop = max(stop, patience)
            if stop or save_due:
                self._read()
                if log is not None:
                    log.sync()
                path = self._save_checkpoint(entry)
            if stop == INTERRUPT:
                raise TrainingInterrupted(path)
            if stop:
                break

    def evaluate(self) -> dict[str, float]:
        """Return {"eval_loss": mean over all targets of eval_dataset, "perplexity": its exponential}.

        Runs in eval mode without gradients; random generators and modes of modules are afterwards as before. Processes
        share the batches; their losses are added in the order of the batches, so the bits are those of one process.
        """
        metrics = evaluate(self)
        self._call("on_evaluate", metrics)
        return metrics

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write the model and the tokenizer's files into a folder, by default args.output_dir.

        Of a model with an adapter that is not merged, only the adapter is written, in peft's files. A model without
        save_pretrained is written as model.safetensors, its state_dict by its own names.
        """
        self._first(functools.partial(self._save_model, absolute(output_dir) if output_dir else self.folder))

    def _save_model(self, folder: Path) -> None:
        with checkpoint.exclusive(folder, nested=True):  # another process may be training into it
            if is_unmerged(self.own_model):
                with contextlib.nullcontext() if self.shards is None else self.shards.whole_adapters(self.own_model):
                    save_adapter(self.own_model, folder)
            elif hasattr(self.own_model, "save_pretrained") and self.shards is None:
                self.own_model.save_pretrained(folder)  # type: ignore[operator]
            else:
                checkpoint.save_weights(self.own_model, folder, self.shards)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def plan(self) -> str:
        """Return what train() is about to do, in numbers."""
        return plan(self)

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return the number of targets that the loss of a batch is a mean over, by the rule in the class docstring."""
        return count_targets(self.own_model, batch)

    # ---- parts of the above, in the order of their use

    def _check(self) -> None:
        """Raise ValueError or TypeError for arguments that do not fit each other, before any file is touched."""
        args, model = self.args, self.model
        if self.train_dataset is None:
            raise ValueError("train() needs a train_dataset")
        if args.eval_steps is not None and self.eval_dataset is None:
            raise ValueError(f"eval_steps is {args.eval_steps}, but there is no eval_dataset")
        self.precision.check(model)
        if args.cuda_graph:
            graph.check(self.device, self.own_model)
        if args.gradient_checkpointing:
            blocks_of(self.own_model)
        if self.tokenizer is not None and not hasattr(self.tokenizer, "save_pretrained"):
            kind = type(self.tokenizer).__name__
            raise TypeError(f"tokenizer is a {kind} without save_pretrained, which each checkpoint needs; leave it out")
        resume.check_model(self.own_model)
        check_shares(self.processes, args, self.own_model)
        if (warmup := arguments.warmup_steps(args, self.total_steps)) >= self.total_steps:
            raise ValueError(f"warmup_steps is {warmup}, but the run has only {self.total_steps} steps")

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Lock the folder of the run for its process of rank 0."""
        with contextlib.ExitStack() as stack:
            self.processes.first(lambda: stack.enter_context(resume.claimed(self.folder)))
            yield

    def _start(self, resume_from: bool | str | os.PathLike[str] | None) -> None:
        """Put state, optimizer and random generators at the first step to do, then delete a run to be overwritten."""
        self.state, self.optimizer = TrainerState(), make_optimizer(self.model, self.args)
        self.gradients = self._make_gradients()
        self.compute = graph.GraphedPass(self) if self.args.cuda_graph else self.backward_of
        self.precision = MixedPrecision(self.args, self.device)  # with the scale of a new run
        self.unread, self.last_step = UnreadSteps(self.device, each=self.args.fp16), {}
        self._newest, self._checked, self.last_overflow = None, False, 0
        self._data, self.flops = self.batches.describe(), flops_of(self)
        if self.processes.count > 1:
            resume.compare_processes(self.processes.share(self._description(None)))
        self.state = self._first(functools.partial(self._open, resume_from))
        if self.state.scaler:
            self.precision.scaler.load_state_dict(self.state.scaler)
        self._synchronise()
        self.stopping, self.begun = Stopping(self.args, self.state), self.state.total

    def _make_gradients(self) -> GradientSum | ShardedGradient:
        count = self.args.gradient_accumulation_steps
        if self.args.parallel == "fsdp":
            self.shards = Shards(self.own_model, self.optimizer, self.processes)
            return ShardedGradient(self.own_model, self.processes, count)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return GradientSum(trained, self.processes, count, exact=self.args.gradient_reduction == "tree")

    def _first(self, function: Callable[[], Any]) -> Any:
        """Call function in the process of rank 0, which the others help if the model is sharded."""
        return self.processes.first(function, None if self.shards is None else self.shards.serve)

    def _synchronise(self) -> None:
        """Give all processes the weights, the optimizer's state and the random state of rank 0."""
        if self.processes.count == 1:
            return
        self.processes.broadcast(list(checkpoint.named_tensors(self.own_model).values()))
        held = self.processes.first(
            lambda: [parameter in self.optimizer.state for parameter in self.gradients.parameters]
        )
        for parameter, there in zip(self.gradients.parameters, held, strict=True):
            if there:
                self.processes.broadcast([tensor for _, tensor in sorted(self.optimizer.init_state(parameter).items())])
        set_random_state(self.processes.first(random_state))

    def _open(self, resume_from: bool | str | os.PathLike[str] | None) -> TrainerState:
        """Load the checkpoint to resume from, if any, and make the folder ready; in the process of rank 0."""
        path, state, overwrite = None, TrainerState(), self.args.overwrite_output_dir
        if resume.restarted(self.folder):
            resume_from, overwrite = bool(checkpoint.list_checkpoints(self.folder)), True
        if resume_from:
            path = resume.choose_checkpoint(self.folder, resume_from)
            state, saved = resume.read_state(path)
            resume.compare(path, saved, self._description(state.global_step), self.args)
        earlier = resume.earlier_run(self.folder, path, overwrite)
        if path is not None:
            checkpoint.load_into(path, self.own_model, self.optimizer, self.shards)
        else:
            seed_everything(self.args.seed)
        resume.check_room(self.folder, self.own_model, self.args.save_steps > 0)
        if self.tokenizer is not None:
            resume.check_tokenizer(self.folder, self.tokenizer)
        resume.delete_run(earlier)
        resume.write_run(self.folder, self._description(None))
        self._rotate(state)  # which a kill may have prevented
        return state

    def _description(self, step: int | None) -> resume.Description:
        """Return all that determines the run beside its state; step: the one after the batches that it holds."""
        if step is None:
            data = {**self._data, "sha256 of the first example": resume.digest([self.batches.first()])}
        else:
            data = {**self._data, "sha256 of the last batches": self.batches.digest(step - 1)}
        return resume.describe_run(self.args, self.own_model, data, self.total_steps, self.device, self.tokenizer)

    def _prepare(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of this process in a step, on the device; none behind the last step."""
        batches = self.batches.of(step, self.gradients.block) if step < self.total_steps else []
        prepared = [
            MicroBatch(move(batch, self.device), self.count_targets(batch), count_tokens(batch), count_padding(batch))
            for batch in batches
        ]
        missing = self.gradients.passes - len(prepared) if step < self.total_steps else 0
        if missing > 0 or (self.gradients.in_step and not all(batch.targets for batch in prepared)):
            inputs = move(self.batches.first(), self.device)  # with weight 0
            prepared += [MicroBatch(inputs, 0, 0, 0)] * missing
            prepared = [batch if batch.targets else batch._replace(inputs=inputs) for batch in prepared]
        return prepared

    def _add_up(self, micro_batches: Sequence[MicroBatch]) -> list[int]:
        """Return targets, tokens and padding of a step over all processes."""
        mine = [sum(column) for column in zip((0, 0, 0), *(batch[1:] for batch in micro_batches), strict=True)]
        return [sum(column) for column in zip(*self.processes.gather(mine), strict=True)]

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the model's mean loss over the targets of a batch, a scalar in float32 or float64."""
        inputs = {name: value for name, value in move(batch, self.device).items() if name != "num_targets"}
        if _takes(type(self.own_model).forward, "return_logits"):
            inputs["return_logits"] = False
        with self.precision.autocast(), self.precision.matmuls():
            loss = getattr(output := self.model(**inputs), "loss", None)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            found = f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"loss {loss!r}"
            raise TypeError(f"the model returned a {type(output).__name__} with {found}, expected a scalar tensor")
        return loss.float() if loss.dtype.itemsize == 2 else loss

    def backward_of(self, batch: Batch, weight: float | Tensor) -> Tensor:
        """Return weight x the loss of a batch, and add its gradients, scaled with fp16, to .grad."""
        loss = self.loss_of(batch)
        loss = loss * (weight.to(loss.dtype) if isinstance(weight, Tensor) else weight)
        torch.autograd.backward(self.precision.scaler.scale(loss))
        return loss

    def _read(self) -> None:
        """Add up the results of the steps since the last call. Raises NonFiniteError for the first bad one."""
        for result, sums, loss, grad_norm in self.unread.read():
            if self.args.fp16 and not math.isfinite(grad_norm):
                count_overflow(self, result.step)
                sums, grad_norm = Sums(tokens=sums.tokens, seconds=sums.seconds, padding=sums.padding), math.nan
            elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
                stop_at_non_finite(self, result.step, loss, grad_norm)
            self.state.total, self.state.window = self.state.total + sums, self.state.window + sums
            self.last_step = {**sums.means(), "learning_rate": result.learning_rate, "grad_norm": grad_norm}

    def _skip(self, step: int, tokens: int) -> None:
        """Count a step without a target. Raises ValueError when an epoch, or all of a shorter run, had none."""
        self.state.skipped_steps += 1
        if self.state.skipped_steps == step >= min(self.steps_per_epoch, self.total_steps):
            raise ValueError(f"step {step} has {tokens} tokens, but not one label that counts; nor has any step before")

    def _log_entry(self) -> dict[str, Any]:
        """Return the means since the last log entry, and learning rate and gradient norm of the last step."""
        numbers, self.state.window = self.last_step | self.state.window.means(), Sums()
        entry: dict[str, Any] = {name: value for name, value in numbers.items() if not math.isnan(value)}
        if self.flops is not None and "tokens_per_second" in entry and (peak := estimate.peak_flops(self)) is not None:
            entry["mfu"] = self.flops * entry["tokens_per_second"] / (peak * self.processes.count)
        if self.state.skipped_steps:
            entry["skipped_steps"] = self.state.skipped_steps
        if self.args.fp16:
            entry |= {"loss_scale": self.precision.scaler.get_scale(), "overflow_steps": self.state.overflow_steps}
        return entry

    def _due(self, step: int, every: int | None) -> bool:
        """Return whether `step` is the last or a multiple of `every`; False for None and 0."""
        return bool(every) and (step % every == 0 or step == self.total_steps)  # type: ignore[operator]

    def _load_best(self) -> None:
        """Load the weights and the optimizer of the best checkpoint; warn if no evaluation was finite."""
        if (step := self.state.best_step) is None:
            warnings.warn("no evaluation had a finite metric, so the weights are those of the last step", stacklevel=3)
            return
        path = self.folder / f"checkpoint-{step}"
        self._first(functools.partial(checkpoint.load_into, path, self.own_model, self.optimizer, self.shards))
        self._synchronise()

    def _save_checkpoint(self, entry: Mapping[str, Any]) -> Path:
        path = self.folder / f"checkpoint-{self.state.global_step}"
        self.stopping.note_checkpoint(entry)
        self._first(functools.partial(self._write_checkpoint, path))
        self._newest = path
        self._call("on_save", path)
        return path

    def _write_checkpoint(self, path: Path) -> None:
        if not self._checked:
            self.batches.check_repeatable(self.state.global_step - 1)
            self._checked = True
        self.state.scaler = self.precision.scaler.state_dict()
        content = {"state": dataclasses.asdict(self.state), **self._description(self.state.global_step)}
        checkpoint.save_checkpoint(path, self.own_model, self.optimizer, content, self.tokenizer, self.shards)
        self._rotate(self.state)

    def _rotate(self, state: TrainerState) -> None:
        if (limit := self.args.save_total_limit) is not None:
            checkpoint.rotate_checkpoints(self.folder, limit, state.global_step, state.best_step)

    def _call(self, event: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)


@functools.lru_cache(maxsize=8)
def _takes(forward: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(forward).parameters
