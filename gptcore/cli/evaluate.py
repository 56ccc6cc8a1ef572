"""gptcore evaluate: the loss of a language model on text files, or the metrics of a model for a task on examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from gptcore.cli.options import add_adapter, add_data, add_machine, load_head, load_model, refuse_without_effect
from gptcore.data.datasets import TextDataset
from gptcore.tasks.examples import Columns
from gptcore.tasks.pipelines import task_name
from gptcore.tasks.records import SUFFIXES
from gptcore.tasks.report import class_lines, metric_lines
from gptcore.tasks.task import Task
from gptcore.tasks.writing import Write, writing_task
from gptcore.training.arguments import TrainingArguments
from gptcore.training.trainer import Trainer

SUMMARY = "Print the loss of a model on text files, or the metrics of a model for a task on examples."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or GGUF file of a model")
    add_adapter(parser)
    add_data(parser)
    add_columns(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="examples in a forward pass (default: 16)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="compute in bfloat16")
    add_machine(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the names of columns of examples."""
    for name in Columns._fields:
        text = f"column or key of the {name} in files of examples (default: guessed)"
        parser.add_argument(f"--{name}-column", help=text)


def columns_of(args: argparse.Namespace) -> Columns:
    return Columns(*(getattr(args, f"{name}_column") for name in Columns._fields))


def run(args: argparse.Namespace) -> int:
    """Print the mean loss over all tokens but the first of each example, or the metrics of the task."""
    if task_name(args.model) is not None:
        return _evaluate_task(args, *load_head(args))
    model, tokenizer = load_model(args)
    if all(Path(file).suffix.lower() in SUFFIXES for file in args.files):
        return _evaluate_task(args, writing_task(model, tokenizer), model)
    names = (f"{name}_column" for name in Columns._fields)
    refuse_without_effect(args, f"the files are not examples ({' '.join(SUFFIXES)})", *names)
    block_size = model.config.n_positions if args.block_size is None else args.block_size
    dataset = TextDataset(tokenizer, args.files, block_size, cache_dir=args.cache_dir)
    options = TrainingArguments(
        output_dir=args.model, per_device_eval_batch_size=args.batch_size, bf16=args.bf16, disable_tqdm=True
    )
    metrics = Trainer(model, options, eval_dataset=dataset, tokenizer=tokenizer).evaluate()
    print(f"loss {metrics['eval_loss']:.4f} nats a token, perplexity {metrics['perplexity']:.2f}")
    return 0


def _evaluate_task(args: argparse.Namespace, task: Task, model: nn.Module) -> int:
    refuse_without_effect(args, "the files are examples", "block_size", "cache_dir", "bf16")
    examples = []
    for file in args.files:
        found = task.read(file, columns_of(args))
        print(*found.notes, sep="\n")
        examples += found.examples
    if isinstance(task, Write):
        task.features(examples)  # which tells how long a text may become
    examples = task.check(examples)
    result = task.score(examples, task.predict(model, examples, args.batch_size))
    print(*metric_lines({task.name: result.metrics}), *class_lines(result), sep="\n")
    return 0
