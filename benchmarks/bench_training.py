"""GPT-2 124M training steps, against transformers, and the time of a step outside its matmuls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measure import FORM, in_child, keep_freed_memory, name_of, pick, seconds
from benchmarks.models import ALL, BATCH, GPT2, PARTS, Trainee, difference, in_parts, matmuls, named, transformers_gpt2
from gptcore import GPT
from gptcore.training.optim import AdamW

Compare = Callable[..., None]
CASE = "batch {} x {}".format(*BATCH)
DTYPES = [torch.float32, torch.bfloat16]


def pair(
    dtype: torch.dtype, weights: torch.dtype = torch.float32, batch: tuple[int, int] = BATCH
) -> tuple[Trainee, Trainee]:
    """Return our model, with weights in `weights`, and transformers' with the same weights in float32."""
    torch.manual_seed(0)
    model = GPT(GPT2)
    other = transformers_gpt2(model)
    model.to(weights)
    ours = Trainee(model, AdamW(model.parameters(), lr=1e-4), batch, dtype)
    # fused, as transformers' Trainer uses by default
    return ours, Trainee(other, torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True), batch, dtype)


@pytest.mark.parametrize(("dtype", "weights"), [(dtype, torch.float32) for dtype in DTYPES] + [(torch.bfloat16,) * 2])
def bench_gpt2(dtype: torch.dtype, weights: torch.dtype, compare: Compare) -> None:
    if weights is torch.bfloat16 and FORM == "quick":
        pytest.skip("takes most of a minute: in the full form only")
    ours, theirs = pair(dtype, weights)
    extra: dict[str, Any] = {"tokens": BATCH[0] * BATCH[1]}
    compare(
        f"GPT-2 124M training step {named(dtype, weights)}", CASE, ours, theirs,
        against="transformers", limit=matmuls(GPT2, BATCH[0] * BATCH[1], dtype), extra=extra,
    )  # fmt: skip
    extra["loss difference"] = difference(ours, theirs)


@pytest.mark.parametrize("part", [PARTS[0], PARTS[-1]] if FORM == "quick" else [ALL, *PARTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if FORM == "quick" else DTYPES, ids=name_of)
def bench_parts(dtype: torch.dtype, part: str, compare: Compare) -> None:
    """Time a step without some of its parts, against the whole step: the difference is their time."""
    compare(
        f"GPT-2 124M step with parts removed {named(dtype, torch.float32)}", part, *in_parts(GPT2, BATCH, dtype, part),
        against="the whole step", limit=matmuls(GPT2, BATCH[0] * BATCH[1], dtype),
    )  # fmt: skip


@pytest.mark.skipif(FORM == "quick", reason="takes two minutes: only in the full form")
@pytest.mark.parametrize("dtype", pick(DTYPES[:1], DTYPES), ids=name_of)
def bench_kept_memory(dtype: torch.dtype, record: Callable[..., None]) -> None:
    """Time both steps in a process whose malloc never returns memory to the system, which is not the default.

    The ratio falls by the share of page faults in transformers' step.
    """
    pytest.importorskip("transformers", reason='transformers is not installed (pip install "gptcore[bench]")')
    ours, theirs = in_child("benchmarks.bench_training", name_of(dtype))
    record(f"GPT-2 124M step in kept memory {name_of(dtype)}", CASE, ours, theirs, against="transformers")


def child(dtype: str) -> None:
    """Train both, and print the seconds of their steps after two warm-up steps."""
    keep_freed_memory()
    steps = {"toy": 2, "quick": 3, "full": 5}[FORM]
    trainees = pair(getattr(torch, dtype))
    times = [[seconds(trainee) for trainee in trainees] for _ in range(2 + steps)]
    print(json.dumps(list(zip(*times[2:], strict=True))))


if __name__ == "__main__":
    child(*sys.argv[1:])
