"""gptcore quantize: write a model with weights in 8 or 4 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptcore.cli.options import add_output, check_output, print_size
from gptcore.hf.gguf import BLOCK_KINDS, export_gguf
from gptcore.model import GPT
from gptcore.quantized import kinds_of
from gptcore.text.tokenizer import Tokenizer

SUMMARY = "Write a model with weights in 8 or 4 bits, as a GGUF file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or GGUF file of a model that is not quantized")
    parser.add_argument(
        "--type", choices=BLOCK_KINDS, default="q8_0",
        help="q8_0: 8.5 bits a weight; q4_0: 4.5, with embedding and output projection in q8_0 (default: q8_0)",
    )  # fmt: skip
    add_output(parser, "file to write")


def run(args: argparse.Namespace) -> int:
    """Write the file, and print its size."""
    output = check_output(args)
    model, tokenizer = GPT.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    if kinds := sorted(set(kinds_of(model).values())):
        raise ValueError(f"{args.model} is in {', '.join(kinds)} already; quantize the model that it was made from")
    export_gguf(model, tokenizer, output, args.type, name=Path(args.model).resolve().name.removesuffix(".gguf"))
    print_size(output)
    return 0
