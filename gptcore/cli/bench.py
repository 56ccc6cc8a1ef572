"""gptcore bench: counters of the CUDA kernels in the GPU simulator."""

from __future__ import annotations

import argparse

from gptcore import counters

SUMMARY = "Count memory traffic and instructions of the CUDA kernels in the GPU simulator; needs no GPU."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--simt", action="store_true", help="count bytes, bank conflicts and tensor-core instructions")


def run(args: argparse.Namespace) -> int:
    """Print a table of counters."""
    if not args.simt:
        raise ValueError("nothing to count: add --simt; to measure time, run `make bench` in gptcore's repository")
    print(counters.table(list(counters.count())))
    return 0
