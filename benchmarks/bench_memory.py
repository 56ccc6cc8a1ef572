"""Peak memory of GPT-2 124M training steps, each model in a process of its own.

What counts is what a process held at most, less what it held when all was imported. The peak is that of the memory
map (VmHWM), not ru_maxrss, which a child inherits from its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.bench_trainer import MEDIUM, MEDIUM_BATCH, MEDIUM_CASE
from benchmarks.measure import FORM, in_child, pick
from benchmarks.models import BATCH, GPT2, train_step
from gptcore import GPT
from gptcore.training.optim import AdamW
from gptcore.training.recompute import recomputed_blocks

STEPS = 2  # the optimizer makes its state in the first: the second has all there is


def held(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def child(which: str, dtype: str) -> None:
    """Train, and print a line of JSON."""
    config, batch = GPT2, BATCH
    if which in ("recomputed", "kept"):
        config, batch = MEDIUM, MEDIUM_BATCH
        importlib.import_module("torch._dynamo")  # as recomputation does; it takes 100 MB
    if which != "theirs":
        before = held("VmRSS")
        model = GPT(config)
        optimizer: torch.optim.Optimizer = AdamW(model.parameters())
    else:
        import transformers

        before = held("VmRSS")
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2.to_dict()))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, batch)
    with recomputed_blocks(model) if which == "recomputed" else contextlib.nullcontext():
        for _ in range(STEPS):
            train_step(model.train(), optimizer, ids, getattr(torch, dtype))
    print(json.dumps({"before": before, "peak": held("VmHWM")}))


def peak(which: str, dtype: str) -> float:
    measured = in_child("benchmarks.bench_memory", which, dtype)
    return float(measured["peak"] - measured["before"])


@pytest.mark.parametrize("dtype", pick(["float32"], ["float32", "bfloat16"]))
def bench_memory(dtype: str, record: Callable[..., None]) -> None:
    pytest.importorskip("transformers", reason='transformers is not installed (pip install "gptcore[bench]")')
    runs = ["ours", "theirs"] * (3 if FORM == "full" else 1)
    with ThreadPoolExecutor(max_workers=2) as pool:  # side by side: what they hold does not depend on their speed
        peaks = list(pool.map(peak, runs, [dtype] * len(runs)))
    record(
        f"peak memory of a GPT-2 124M step {dtype}", "batch {} x {}".format(*BATCH), peaks[::2], peaks[1::2],
        against="transformers", unit="B",
    )  # fmt: skip


def bench_recomputation(record: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the peak with gradient_checkpointing=True; bench_trainer.py has the time that it costs."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # malloc returns tensors that are freed to the system
    runs = ["recomputed", "kept"] * (3 if FORM == "full" else 1)
    peaks = [peak(which, "float32") for which in runs]
    record(
        "peak memory with recomputation", MEDIUM_CASE, peaks[::2], peaks[1::2],
        against="without it", unit="B",
    )  # fmt: skip


if __name__ == "__main__":
    child(*sys.argv[1:])
