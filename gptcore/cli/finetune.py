"""gptcore finetune: from a file of examples to a model for a task, with its report."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
from pathlib import Path

from gptcore.cli.options import add_fields, add_machine, pick
from gptcore.cli.train import check_unused, in_each_process, with_resume
from gptcore.tasks.recipe import DERIVED, RUN, FinetuneOptions, finetune
from gptcore.training import distributed
from gptcore.training.arguments import TrainingArguments
from gptcore.training.resume import restarted
from gptcore.training.signals import TrainingInterrupted

SUMMARY = "Fine-tune a model for a task on a file of examples, and report how good it is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a model to start from")
    group = parser.add_argument_group("task and examples")
    add_fields(group, FinetuneOptions, {})
    for action in group._group_actions:
        action.required = action.dest in ("task", "train")
    group = parser.add_argument_group("training", "Options without a default are derived from the model and the data.")
    group.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in output_dir, if any")
    add_fields(group, TrainingArguments, {**RUN, **dict.fromkeys(DERIVED)}, skip=("parallel",))
    add_machine(parser.add_argument_group("machine"))


def run(args: argparse.Namespace) -> int:
    """Print the data, the baselines and the metrics. Returns 130 if interrupted.

    Under torchrun each process runs this; that of rank 0 prints and writes.
    """
    options = FinetuneOptions(**pick(args, FinetuneOptions))
    return in_each_process(args, functools.partial(_run, args, options))


def _run(args: argparse.Namespace, options: FinetuneOptions, processes: distributed.Processes) -> int:
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TrainingArguments)
        if {f"--{no}{field.name.replace('_', '-')}" for no in ("", "no-")} & args.given
    }
    out = Path(given.get("output_dir", RUN["output_dir"]))
    args.resume = args.resume or processes.first(lambda: restarted(out))
    processes.first(lambda: check_unused(out, args.resume, given.get("overwrite_output_dir", False)))
    try:
        report = finetune(args.model, options, args.resume, args.device, **given)
    except TrainingInterrupted as interrupt:
        command = shlex.join(["gptcore", *with_resume(args.argv)])
        print(f"\ninterrupted; saved {interrupt.checkpoint}. To resume:\n\n    {command}\n")
        return 130
    print("", *report.lines(), "", sep="\n")
    print(f"report            {out / 'report.html'}, {out / 'report.json'}")
    print(f"model             {out}    (gptcore predict {out} TEXT or FILE)")
    return 0
