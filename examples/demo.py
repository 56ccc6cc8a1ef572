"""Trains a small GPT on the documentation inside Python's standard library: `make demo` runs this.

All of it is one command of gptcore's, which this prints and runs. Run again, it goes on from what is there.
"""

import shlex
import sys
from pathlib import Path

from gptcore import cli
from gptcore.data.corpus import write_standard_library_corpus

OUT = Path("out/demo")


def main() -> int:
    corpus = OUT / "corpus.txt"
    if not corpus.exists():
        write_standard_library_corpus(corpus)
    print(f"corpus            {corpus}, {corpus.stat().st_size / 1e6:.1f} MB of documentation")
    command = ["train", str(corpus), "--output-dir", str(OUT / "model"), "--cache-dir", str(OUT)]
    command += ["--vocab-size", "2048", "--max-steps", "1000", "--per-device-train-batch-size", "8"]
    command += ["--learning-rate", "2e-3", "--eval-steps", "200", "--save-steps", "200", "--bf16", "--resume"]
    print(f"command           gptcore {shlex.join(command)}\n")
    return cli.main(command, resume_command="make demo")


if __name__ == "__main__":
    sys.exit(main())
