"""GPT-2 124M training steps, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measure import name_of
from benchmarks.models import BATCH, GPT2, Trainee, difference, matmuls, transformers_gpt2
from gptcore import GPT
from gptcore.optim import AdamW

Compare = Callable[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def bench_gpt2(dtype: torch.dtype, compare: Compare) -> None:
    torch.manual_seed(0)
    model = GPT(GPT2)
    other = transformers_gpt2(model)
    ours = Trainee(model, AdamW(model.parameters(), lr=1e-4), BATCH, dtype)
    # fused: what transformers' own Trainer takes
    theirs = Trainee(other, torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True), BATCH, dtype)
    extra: dict[str, Any] = {"tokens": BATCH[0] * BATCH[1]}
    compare(
        f"GPT-2 124M training step {name_of(dtype)}", "batch {} x {}".format(*BATCH), ours, theirs,
        against="transformers", limit=matmuls(GPT2, BATCH[0] * BATCH[1], dtype), extra=extra,
    )  # fmt: skip
    extra["loss difference"] = difference(ours, theirs)
