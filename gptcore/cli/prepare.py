"""gptcore prepare: from raw text to clean, deduplicated, split token shards, with a report."""

from __future__ import annotations

import argparse
import os
import shlex

from gptcore.cli.options import check_range
from gptcore.prepare.pipeline import prepare
from gptcore.prepare.recipe import RECIPES, make_recipe, read_changes

SUMMARY = "Make a clean, deduplicated, tokenized corpus of raw text, with a report."
_NOT_IN_REPORT = {"--workers": 1, "--overwrite": 0, "--skip-bad": 0}  # they change no document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="file, folder or glob of .txt .md .html .jsonl .csv .parquet, or with .gz .zst .bz2; NAME=INPUT: a source",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to make")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="web", help="steps and thresholds (default: web)")
    parser.add_argument("--config", help="TOML file that changes single values of the recipe; see docs/data.md")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: train one on the training text)")
    parser.add_argument("--decontaminate", nargs="+", default=[], metavar="FILE", help="evaluation files to protect")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; the output is the same (default: one a core)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read, and list them")
    parser.add_argument("--no-rejected", action="store_true", help="do not keep the dropped documents in OUT/rejected")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT and an unfinished run of other settings")


def run(args: argparse.Namespace) -> int:
    """Prepare the corpus and print what was kept."""
    check_range(args, 1, 1024, "workers")
    changes = read_changes(args.config) if args.config else {}
    if args.decontaminate:
        changes["decontaminate"] = changes.get("decontaminate", {}) | {"files": args.decontaminate}
    recipe = make_recipe(args.recipe, changes, args.config or "the recipe")
    report = prepare(
        args.inputs,
        args.output,
        recipe,
        tokenizer=args.tokenizer,
        workers=args.workers,
        skip_bad=args.skip_bad,
        keep_rejected=not args.no_rejected,
        overwrite=args.overwrite,
        command=shlex.join(["gptcore", *_without(args.argv)]),
    )
    read, kept = report["read"], report["kept"]
    tokens = {name: split["tokens"] for name, split in report["splits"].items()}
    documents = f"{kept['documents']:,} of {read['documents']:,} documents"
    print(f"\nkept      {documents}, {kept['bytes']:,} of {read['bytes']:,} bytes")
    for step in report["steps"]:
        if dropped := sum(counts["documents"] for counts in step["dropped"].values()):
            print(f"  {step['step']:<20} dropped {dropped:,} of {step['documents_in']:,}")
    if read["bad"]:
        print(f"bad       {read['bad']:,} records could not be read; the report lists them")
    print(f"tokens    {', '.join(f'{name} {count:,}' for name, count in tokens.items())}")
    print(f"report    {args.output}/report.html\nto train  gptcore train {args.output}")
    return 0


def _without(argv: list[str]) -> list[str]:
    """Return the command without the options that do not change the output."""
    found, skip = [], 0
    for word in argv:
        name, equals, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in _NOT_IN_REPORT:
            skip = 0 if equals else _NOT_IN_REPORT[name]
        else:
            found.append(word)
    return found
