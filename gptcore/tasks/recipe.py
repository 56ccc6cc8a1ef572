"""From a file of examples to a model for a task, with its report: the recipe of `gptcore finetune`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gptcore.data.datasets import epoch_order
from gptcore.files import PathLike
from gptcore.lora import add_adapter, merge_adapter, save_adapter
from gptcore.tasks.examples import Columns
from gptcore.tasks.report import Report, write_report
from gptcore.tasks.table import TASKS, TEXT_TASKS
from gptcore.tasks.task import Result, Task
from gptcore.text.tokenizer import Tokenizer
from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.distributed import Processes, join
from gptcore.training.resume import restarted
from gptcore.training.trainer import Trainer

RATE = 6.25e-5 * 768  # learning rate times width: GPT-1's (Radford et al. 2018, section 4.1), for models of any width
LORA_FACTOR = 10  # of the learning rate, for adapters
# Where fine-tuning differs from TrainingArguments. What is not here and None follows from the data.
RUN: dict[str, Any] = {
    "output_dir": "finetuned",
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "warmup_ratio": 0.05,
    "weight_decay": 0.01,
    "logging_steps": 10,
    "save_total_limit": 1,
    "group_by_length": True,
    "load_best_model_at_end": True,
    "early_stopping_patience": 4,
}
DERIVED = ("learning_rate", "eval_steps", "save_steps", "metric_for_best_model", "greater_is_better")
EVALUATIONS = 2  # in an epoch
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
KINDS: dict[str, type[Task]] = {**TASKS, **TEXT_TASKS}


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class FinetuneOptions:
    """What is fine-tuned on what. Each field is an option of the command line."""

    task: Literal["classify", "entities", "answer", "choice", "text", "chat"] = _option(
        dataclasses.MISSING, "what to learn"
    )
    train: str = _option(dataclasses.MISSING, "file of training examples: CSV, TSV, JSON, JSON lines or CoNLL")
    validation: str | None = _option(None, "file of validation examples; none: a part of the training file")
    validation_fraction: float = _option(0.1, "part of the training file, without --validation")
    text_column: str | None = _option(None, "name of the column or key of the text or context; none: guessed")
    label_column: str | None = _option(None, "name of that of the label, entities or answers; none: guessed")
    pair_column: str | None = _option(None, "name of that of the second text, to classify pairs; none: guessed")
    max_length: int | None = _option(None, "longest sequence, in tokens; none: the model's n_positions")
    layout: Literal["plain", "gpt1"] = _option("plain", "gpt1: with start, delimiter and extract tokens, as GPT-1 did")
    both_orders: bool = _option(False, "classify pairs by the sum of both orders (similarity in GPT-1)")
    labelling: Literal["last", "twice"] = _option(
        "last", "entities: tag a word at its last token, or at that of a second copy of the text"
    )
    lm_coef: float = _option(0.0, "weight of the language-model loss beside that of the task; 0.5 in GPT-1")
    head_dropout: float | None = _option(None, "dropout before the head; none: 0.1 for entities and choices, else 0")
    dropout: float | None = _option(
        None, "dropout of embeddings, attention and residuals; none: as in the model; 0.1 in GPT-1"
    )
    chat_template: Literal["chatml", "alpaca", "plain"] | None = _option(
        None, "chat: how messages become text; none: as the model does, else chatml"
    )
    max_new_tokens: int | None = _option(
        None, "text, chat: tokens that the model writes of a validation text, at most; none: as in the longest target"
    )
    lora: int | None = _option(None, "rank of an adapter to train instead of all weights (LoRA); none: all weights")

    def __post_init__(self) -> None:
        if self.task not in KINDS:
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(KINDS)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction should be between 0 and 1, not {self.validation_fraction}")
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"lora should be a rank of at least 1, or none, not {self.lora}")
        every = {name for task in KINDS.values() for name in task.options | task.head_options}
        allowed = KINDS[self.task].options | KINDS[self.task].head_options
        for field in dataclasses.fields(self):
            if field.name in every - allowed and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect on the task {self.task}; leave it out")

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.label_column, self.pair_column)


class Scoring(TrainerCallback):
    """Adds the metrics of the task to those of each evaluation."""

    def __init__(self, task: Task, validation: Sequence[Any]) -> None:
        self.task, self.validation = task, validation

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        result = scored(self.task, trainer, self.validation)
        metrics.update({f"eval_{name}": value for name, value in result.metrics.items()})


def scored(task: Task, trainer: Trainer, examples: Sequence[Any]) -> Result:
    """Return how good the model is, with settings chosen by these examples. Processes share the predictions."""
    rank, count = trainer.processes.rank, trainer.processes.count
    mine = task.predict(trainer.own_model, examples[rank::count], trainer.args.per_device_eval_batch_size)
    parts = trainer.processes.share(mine)
    predictions = [parts[i % count][i // count] for i in range(len(examples))]
    return task.score(examples, task.tune(examples, predictions))


def finetune(
    model_folder: PathLike,
    options: FinetuneOptions,
    resume: bool = False,
    device: torch.device | str = "cpu",
    **training: Any,
) -> Report:
    """Fine-tune the model in a folder, save it with its report into output_dir, and return the report.

    resume: from the newest checkpoint in output_dir, if there is one; the result has the bits of an uninterrupted run.
    training: fields of TrainingArguments. Others are as in RUN, or follow from the model and the data: DERIVED.

    Under torchrun each process calls this; that of rank 0 alone prints and writes files. The bits are those of one.

    Raises ValueError, before anything is written, for examples that cannot be used; and as Trainer.train.
    """
    processes = join(torch.device(device))
    with processes.one_speaks():
        return _finetune(model_folder, options, resume, device, processes, training)


def _finetune(
    model_folder: PathLike,
    options: FinetuneOptions,
    resume: bool,
    device: torch.device | str,
    processes: Processes,
    training: dict[str, Any],
) -> Report:
    if training.get("parallel", "data") != "data":
        raise ValueError(f"parallel is {training['parallel']!r}, but fine-tuning needs the whole model: leave it out")
    seed = training.get("seed", TrainingArguments.seed)
    task_class = KINDS[options.task]
    train, validation = read(options, seed)
    head = task_class.settle(train, validation)
    if training.get("packing") and not task_class.packs:
        raise ValueError(f"packing is for the tasks {', '.join(TEXT_TASKS)}, not for {options.task}; leave it out")
    before = processes.after_first(lambda: Tokenizer.from_pretrained(model_folder))
    tokenizer = task_class.prepare_tokenizer(before, options.chat_template, options.layout)
    torch.manual_seed(seed)
    settings = {**head, "lm_coef": options.lm_coef, "head_dropout": options.head_dropout}
    body = dict.fromkeys(DROPOUTS if options.dropout is not None else (), options.dropout)
    model = processes.after_first(lambda: task_class.load(model_folder, body, settings)).to(device)
    task = task_class(tokenizer, getattr(model, "labels", []), settings_for(options, model, head))
    features = [task.features(part) for part in (train, validation)]
    describe(task, train, validation, features)
    task.attach(model)
    new = task.prepare_model(model, before.vocab_size)
    if options.lora is not None:
        r = options.lora
        print(add_adapter(model, r=r, alpha=2 * r, target_modules="all-linear", trainable_token_indices=new))
    batch_size = training.get("per_device_train_batch_size", RUN["per_device_train_batch_size"])
    batch_size *= training.get("gradient_accumulation_steps", 1)
    arguments = TrainingArguments(**derived(training, task, options, model, math.ceil(len(features[0]) / batch_size)))
    results = {name: task.score(validation, predictions) for name, predictions in task.baselines(train, validation)}
    for name, result in results.items():
        print(f"baseline          {name}: {task.metric} {result.metrics[task.metric]:.4f}")
    out = Path(arguments.output_dir)
    resume = resume or processes.first(lambda: restarted(out))
    saved = resume and processes.first(lambda: bool(list_checkpoints(out)))
    if resume and not saved:
        arguments.overwrite_output_dir = True  # a run that was killed before its first checkpoint starts again
    scoring = [] if task.selects[0] == "eval_loss" else [Scoring(task, validation)]
    trainer = Trainer(model, arguments, features[0], features[1], task.collator, tokenizer, scoring)
    trainer.train(resume_from_checkpoint=saved)
    result = scored(task, trainer, validation)
    if task.selects[0] == "eval_loss":
        result.metrics["perplexity"] = trainer.evaluate()["perplexity"]
    task.attach(model)
    if options.lora is not None:
        save = functools.partial(save_adapter, model, out / "adapter", base_model_name_or_path=str(model_folder))
        processes.first(save)
        if new or options.task in TEXT_TASKS:
            processes.first(lambda: tokenizer.save_pretrained(out / "adapter"))
        merge_adapter(model, keep_original=False)
    trainer.save_model()
    report = Report(
        task=options.task,
        model=str(model_folder),
        metric=task.metric,
        result=result,
        baselines={name: result.metrics for name, result in results.items()},
        options={**dataclasses.asdict(options), **dataclasses.asdict(arguments)},
        examples={"train": len(train), "validation": len(validation)},
        steps=trainer.state.global_step,
        best_step=trainer.state.best_step,
    )
    processes.first(lambda: write_report(report, out))
    return report


def read(options: FinetuneOptions, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the training and the validation examples, and print what was guessed about the files."""
    task = KINDS[options.task]
    parts = []
    for path in (options.train, options.validation):
        found = task.read(path, options.columns) if path is not None else None
        for note in found.notes if found is not None else ():
            print(note)
        parts.append(found)
    assert parts[0] is not None
    train = parts[0].examples
    if parts[1] is not None:
        validation = parts[1].examples
    else:
        train, validation = split(task, train, options.validation_fraction, seed)
        print(f"validation: {len(validation):,} of the examples, drawn with seed {seed}")
    known = {_content(example) for example in train}
    if shared := sum(_content(example) in known for example in validation):
        print(
            f"warning: {shared:,} validation examples have the text of a training example, so their score is too high"
        )
    return train, validation


def split(task: type[Task], examples: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Return a training and a validation part; the last example with a label stays in the former."""
    left = Counter(name for example in examples for name in task.names(example))
    wanted = max(1, round(len(examples) * fraction))
    drawn: set[int] = set()
    for i in epoch_order(len(examples), seed, 0).tolist():
        if len(drawn) < wanted and all(left[name] > 1 for name in task.names(examples[i])):
            drawn.add(i)
            left.subtract(task.names(examples[i]))
    if not drawn or len(drawn) == len(examples):
        raise ValueError(f"{len(examples)} examples are too few to set some aside for validation; give --validation")
    parts: tuple[list[Any], list[Any]] = ([], [])
    for i, example in enumerate(examples):
        parts[i in drawn].append(example)
    return parts


def _content(example: Any) -> tuple[Any, ...]:
    """Return the texts of an example, without its place and its labels."""
    return tuple(
        value
        for name, value in example._asdict().items()
        if name not in ("place", "id", "label", "tags", "answers", "words")
    )


def settings_for(options: FinetuneOptions, model: nn.Module, head: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the task: see Task."""
    positions = model.config.n_positions  # type: ignore[union-attr]
    length = positions if options.max_length is None else options.max_length
    if not 2 <= length <= positions:  # type: ignore[operator]
        raise ValueError(f"max_length is {length}, expected 2 to the model's {positions} positions")
    settings = {"task": options.task, "layout": options.layout, "max_length": length}
    settings |= {name: getattr(options, name) for name in ("both_orders", "labelling", "lm_coef", "max_new_tokens")
                 if name in KINDS[options.task].options}  # fmt: skip
    return settings | ({"problem_type": head["problem_type"]} if "problem_type" in head else {})


def describe(task: Task, train: Sequence[Any], validation: Sequence[Any], features: list[list[dict[str, Any]]]) -> None:
    """Print the balance of the labels, the lengths, and what is cut off."""
    for name, part, made in zip(("training", "validation"), (train, validation), features, strict=True):
        lengths = [_length(feature["input_ids"]) for feature in made]
        quantiles = np.percentile(lengths, [50, 95, 100], method="lower").astype(int)
        windows = f" in {len(made):,} windows" if len(made) != len(part) else ""
        print(f"{name:<17} {len(part):,} examples{windows}; tokens: median {quantiles[0]}, 95% {quantiles[1]}, "
              f"longest {quantiles[2]}")  # fmt: skip
        for line in task.describe(part):
            print(f"{'':<17} {line}")
    cut = f"{task.truncated:,} texts are cut off" if task.truncated else "no text is cut off"
    print(f"{'truncation':<17} {cut} at max_length {task.max_length}")


def _length(ids: Any) -> int:
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def derived(
    training: dict[str, Any], task: Task, options: FinetuneOptions, model: nn.Module, steps_per_epoch: int
) -> dict[str, Any]:
    """Return the arguments of the trainer: as given, else as in RUN, else from the model and the data."""
    width: int = model.config.n_embd  # type: ignore[union-attr, assignment]
    every = training.get("eval_steps") or max(1, steps_per_epoch // EVALUATIONS)
    follows = {
        "learning_rate": RATE / width * (LORA_FACTOR if options.lora is not None else 1),
        "eval_steps": every,
        "save_steps": every,
        "metric_for_best_model": task.selects[0],
        "greater_is_better": task.selects[1],
    }
    made = {**RUN, **follows, **training}
    steps = made["max_steps"] if made.get("max_steps", -1) > 0 else made["num_train_epochs"] * steps_per_epoch
    if "warmup_steps" in training or ("warmup_ratio" not in training and steps <= 1):
        del made["warmup_ratio"]
    return made
