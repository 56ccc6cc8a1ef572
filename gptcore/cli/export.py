"""gptcore export: write a model in another program's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptcore.cli.options import add_output, check_output, print_size, refuse_without_effect
from gptcore.hf.gguf import BLOCK_KINDS, DTYPES, export_gguf, export_hf
from gptcore.hf.gguf_adapter import export_gguf_adapter
from gptcore.lora import load_adapter
from gptcore.model import GPT
from gptcore.text.tokenizer import Tokenizer

SUMMARY = "Write a model for llama.cpp (gguf) or for transformers (hf)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="out", metavar="MODEL", help="folder or GGUF file of a model (default: out)"
    )
    parser.add_argument("--to", choices=("gguf", "hf"), default="gguf", help="format to write (default: gguf)")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *BLOCK_KINDS),
        help="dtype of the weights (default: the model's); hf has no q8_0 or q4_0",
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="write this adapter of the model alone, for llama.cpp (default: the model)"
    )
    add_output(parser, "file (gguf) or folder (hf) to write")


def run(args: argparse.Namespace) -> int:
    """Write the file or folder, and print its size."""
    if args.adapter is not None:
        refuse_without_effect(args, "an adapter is written as f32 GGUF", "to", "dtype")
    output = check_output(args, folder=args.to == "hf")
    decoded = DTYPES.get(args.dtype) if args.to == "hf" else None  # of a quantized model
    model = GPT.from_pretrained(args.model, dtype=decoded)
    if args.adapter is not None:
        load_adapter(model, args.adapter)
        export_gguf_adapter(model, output)
    elif args.to == "hf":
        export_hf(model, Tokenizer.from_pretrained(args.model), output, args.dtype)
    else:
        name = Path(args.model).resolve().name.removesuffix(".gguf")
        export_gguf(model, Tokenizer.from_pretrained(args.model), output, args.dtype, name=name)
    print_size(output)
    return 0
