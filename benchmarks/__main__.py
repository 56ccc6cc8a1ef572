"""python -m benchmarks: measure, print the table, and write results.json and the charts.

Each file is measured in its own process, because earlier allocations of a process change the page faults of the next
benchmark. With --toy all files share this process, since starting processes would take most of the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOTHING_SELECTED = 5  # pytest's exit status
LIMITED = {
    "avx2": {
        "GPTCORE_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure, print the table, and write results.json and the charts.",
        epilog="Other arguments go to pytest: -k 'attention', -x, ...",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--full", action="store_true", help="more rounds of each benchmark, for results to commit")
    form.add_argument(
        "--toy", action="store_true", help="tiny sizes, to test that everything runs; the times are meaningless"
    )
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile where possible")
    parser.add_argument("--isa", choices=LIMITED, help="limit gptcore, PyTorch, oneDNN and MKL to this instruction set")
    parser.add_argument("--output", default="out/benchmarks", metavar="DIR", help="default: %(default)s")
    args, rest = parser.parse_known_args()
    # environment variables, because pytest needs the sizes, which are parameters, at import
    os.environ["GPTCORE_BENCH"] = "full" if args.full else "toy" if args.toy else "quick"
    os.environ["GPTCORE_BENCH_COMPILE"] = str(int(args.compile))
    if args.isa:
        os.environ.update(LIMITED[args.isa])
    if args.toy:
        os.environ["OMP_NUM_THREADS"] = "1"  # starting threads would take longer than the work
    from benchmarks import report, tables  # import what reads the environment

    fixed = ["-q", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"]
    status, parts = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for file in [HERE] if args.toy else sorted(HERE.glob("bench_*.py")):
            part = Path(folder) / f"{file.stem}.json"
            options = [str(file), *fixed, "--benchmark-quiet", "--output", str(part), *rest]
            if args.toy:
                found = pytest.main(options)
            else:
                found = subprocess.run([sys.executable, "-m", "pytest", *options], check=False).returncode
            status = status or (found if found != NOTHING_SELECTED else 0)
            if part.exists():
                parts.append(tables.load(part))
    if not parts:
        return status or NOTHING_SELECTED
    report.present(tables.joined(parts), Path(args.output))
    return status


sys.exit(main())
