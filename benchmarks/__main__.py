"""python -m benchmarks: measure, print the table, and write results.json and the charts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="Other arguments go to pytest: -k 'attention', -x, ..."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--full", action="store_true", help="more rounds of each, for results that are to be kept")
    form.add_argument(
        "--toy", action="store_true", help="tiny sizes, to see that everything runs; the times mean nothing"
    )
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile where there is a choice")
    parser.add_argument("--output", default="out/benchmarks", metavar="DIR", help="default: %(default)s")
    args, rest = parser.parse_known_args()
    # the environment, because sizes are parameters of the benchmarks, which pytest wants to know at import
    os.environ["GPTCORE_BENCH"] = "full" if args.full else "toy" if args.toy else "quick"
    os.environ["GPTCORE_BENCH_COMPILE"] = str(int(args.compile))
    if args.toy:
        os.environ["OMP_NUM_THREADS"] = "1"  # threads would cost more than they do
    fixed = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"]
    return pytest.main([str(Path(__file__).parent), *fixed, "--benchmark-quiet", "--output", args.output, *rest])


sys.exit(main())
