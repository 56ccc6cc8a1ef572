"""gptcore export: write a model in another program's format."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gptcore.hf.gguf import BLOCK_KINDS, DTYPES, export_gguf, export_hf
from gptcore.model import GPT
from gptcore.text.tokenizer import Tokenizer

SUMMARY = "Write a model for llama.cpp (gguf) or for transformers (hf)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="out", metavar="MODEL", help="folder of a model (default: out)")
    parser.add_argument("--to", choices=("gguf", "hf"), default="gguf", help="format to write (default: gguf)")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *BLOCK_KINDS),
        help="dtype of the weights (default: the model's); hf has no q8_0 or q4_0",
    )
    parser.add_argument("-o", "--output", required=True, help="file (gguf) or folder (hf) to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the file or folder, and print its size."""
    output = Path(args.output)
    kind, is_kind = ("folder", output.is_dir()) if args.to == "hf" else ("regular file", output.is_file())
    if os.path.lexists(output) and not is_kind:
        raise ValueError(f"--output {output} is not a {kind}; choose another --output")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists; replace it with --overwrite, or choose another --output")
    model, tokenizer = GPT.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    if args.to == "hf":
        export_hf(model, tokenizer, output, args.dtype)
    else:
        export_gguf(model, tokenizer, output, args.dtype, name=Path(args.model).resolve().name)
    print(f"{output}    {sum(path.stat().st_size for path in [output, *output.rglob('*')] if path.is_file()):,} bytes")
    return 0
