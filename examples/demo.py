"""Trains a small GPT on the documentation inside Python's standard library: `make demo` runs this.

Training takes three minutes or so on any CPU with two cores. The number of steps and the precision follow from
the speed of the machine, which is measured for a second. Run again, it resumes, or shows what the finished run wrote.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from gptcore import GPT, GPTConfig, cli, precision
from gptcore.cli.train import SMALL_MODEL
from gptcore.data.corpus import write_standard_library_corpus
from gptcore.files import read_json, write_json
from gptcore.info import cpu_name

OUT = Path("out/demo")
VOCAB_SIZE, BATCH_SIZE, LENGTH = 2048, 8, 256
SECONDS = 180  # to train in, by the measured speed: a busy machine may take twice as long
EVALUATIONS = 0.25  # of that time, together with checkpoints
MOST_STEPS = 1000  # more would repeat the corpus too often


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time to train in (default: {SECONDS})")
    seconds = parser.parse_args(argv).seconds
    corpus = OUT / "corpus.txt"
    if not corpus.exists():
        write_standard_library_corpus(corpus)
    print(f"corpus            {corpus}, {corpus.stat().st_size / 1e6:.1f} MB of documentation")
    # Kept for the next call: a resumed run needs the same steps and the same precision
    plan = OUT / "plan.json"
    if not plan.exists():
        write_json(plan, make_plan(seconds))
    chosen = read_json(plan)
    for heading in ("speed", "precision", "steps"):
        print(f"{heading:<17} {chosen[heading]}")
    every = str(max(1, chosen["max_steps"] // 5))
    command = ["train", str(corpus), "--output-dir", str(OUT / "model"), "--cache-dir", str(OUT)]
    command += ["--vocab-size", str(VOCAB_SIZE), "--max-steps", str(chosen["max_steps"])]
    command += ["--per-device-train-batch-size", str(BATCH_SIZE), "--learning-rate", "2e-3"]
    command += ["--warmup-steps", str(chosen["max_steps"] // 50)]
    command += ["--eval-steps", every, "--save-steps", every, "--device", "cpu", "--resume"]
    if chosen["bf16"]:
        command += ["--bf16"]
    print(f"command           gptcore {shlex.join(command)}\n")
    status = cli.main(command, resume_command="make demo")
    if status == 0 and (OUT / "model" / "config.json").exists():
        program = Path(sys.executable).with_name("gptcore")
        print(f"\nserve it: {program} serve {OUT / 'model'}    then open http://127.0.0.1:8000/ in a browser")
    return status


def make_plan(seconds: float) -> dict[str, str | int | bool]:
    """Measure a training step in float32 and bfloat16, and return the faster with the steps that fit, and why."""
    ratio = precision.slowdown(torch.bfloat16)  # of one block; the whole step could take minutes where it is slow
    dtypes = [torch.float32] if ratio > 2 else [torch.float32, torch.bfloat16]
    model = GPT(GPTConfig(**SMALL_MODEL, vocab_size=VOCAB_SIZE))
    ids = torch.randint(VOCAB_SIZE, (BATCH_SIZE, LENGTH), generator=torch.Generator().manual_seed(0))
    times = precision.fastest([partial(step, model, ids, dtype) for dtype in dtypes], seconds=1.0)
    rates = {precision.name(dtype): BATCH_SIZE * LENGTH / time for dtype, time in zip(dtypes, times, strict=True)}
    speed = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items())
    if len(dtypes) == 1:
        speed += f", bfloat16 takes {ratio:.2g} times as long (measured on one block)"
    name, share = max(rates, key=lambda name: rates[name]), 1 - EVALUATIONS
    steps = max(20, min(int(seconds * share / min(times)), MOST_STEPS))
    expected = steps * min(times) / share
    return {
        "speed": f"{speed}; {torch.get_num_threads()} threads of {cpu_name()}",
        "precision": f"{name}, which is faster here",
        "steps": f"{steps} of {BATCH_SIZE * LENGTH:,} tokens, about {expected:.0f} seconds with evaluations",
        "max_steps": steps,
        "bf16": name == "bfloat16",
    }


def step(model: GPT, ids: torch.Tensor, dtype: torch.dtype) -> None:
    """Compute the loss and the gradients of one batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, return_logits=False).loss
    torch.autograd.backward(loss)
    model.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
