"""gptcore predict: what a model for a task says about texts, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from gptcore.cli.evaluate import add_columns, columns_of
from gptcore.cli.options import add_adapter, add_machine, check_range, load_head, load_model, refuse_without_effect
from gptcore.tasks import Answer, Choose, Classify, Task, Write
from gptcore.tasks.examples import Choice, Question, Sentence, Text, words_of
from gptcore.tasks.pipelines import task_name
from gptcore.tasks.records import SUFFIXES
from gptcore.tasks.targets import Target
from gptcore.tasks.writing import writing_task

SUMMARY = "Classify, label, answer, choose or write with a fine-tuned model; prints JSON lines."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a model for a task, or of a language model")
    parser.add_argument("inputs", nargs="+", metavar="TEXT|FILE", help="texts, or files of examples")
    parser.add_argument(
        "--with", dest="other", nargs="+", metavar="TEXT",
        help="what belongs to each TEXT: the context of a question, the second of a pair, the choices",
    )  # fmt: skip
    add_columns(parser)
    add_adapter(parser)
    parser.add_argument(
        "--max-new-tokens", type=int,
        help="tokens that a language model writes, at most (default: 128, or half of its positions)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help="examples in a forward pass (default: 32)")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each example, in their order."""
    task, model = _load(args)
    examples: list[Any] = []
    for text in args.inputs:
        if os.path.isfile(text):
            if args.other:
                raise ValueError(f"--with is for texts, but {text} is a file, which has columns of its own")
            found = task.read(text, columns_of(args), False)
            print(*found.notes, sep="\n", file=sys.stderr)
            examples += found.examples
        elif Path(text).suffix.lower() in SUFFIXES and " " not in text:
            raise FileNotFoundError(f"{text} does not exist")
        else:
            examples.append(_example(task, text, args.other or []))
    for prediction in task.predict(model, examples, args.batch_size):
        shown = {name: prediction[name] for name in task.shown if name in prediction}
        print(json.dumps(shown, ensure_ascii=False))
    if task.truncated:
        print(f"warning: {task.truncated:,} texts were cut off at {task.max_length} tokens", file=sys.stderr)
    return 0


def _load(args: argparse.Namespace) -> tuple[Task, nn.Module]:
    if task_name(args.model) is None:
        model, tokenizer = load_model(args)
        check_range(args, 1, model.config.n_positions - 1, "max_new_tokens")
        new = min(128, model.config.n_positions // 2) if args.max_new_tokens is None else args.max_new_tokens
        return writing_task(model, tokenizer, new), model
    refuse_without_effect(args, "the model has a head and writes nothing", "max_new_tokens")
    return load_head(args)


def _example(task: Task, text: str, other: list[str]) -> Any:
    """Return the example of a text of the command line."""
    if not text.strip():
        raise ValueError("the text is empty")
    wanted = {Answer: (1, 1, "the context of the question"), Choose: (2, 100, "the choices")}
    low, high, what = wanted.get(type(task), (0, isinstance(task, Classify), "a second text"))
    if not low <= len(other) <= high:
        raise ValueError(f"--with has {len(other)} texts, expected {low or 'none'} or more: {what}")
    if isinstance(task, Write):
        return Target("the text", (("user", text),))
    if isinstance(task, Answer):
        return Question("the text", text, other[0])
    if isinstance(task, Choose):
        return Choice("the text", text, tuple(other))
    if isinstance(task, Classify):
        return Text("the text", text, other[0] if other else None)
    return Sentence("the text", text, words_of(text))
