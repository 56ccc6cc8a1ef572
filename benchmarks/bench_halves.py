"""16-bit floating point against float32: linear layers, and training steps of GPT-2 124M.

Without instructions for bfloat16 its products are made in float32, and can at best be as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.bench_kernels import forward_backward
from benchmarks.bench_training import pair
from benchmarks.measure import PYTORCH, name_of, pick, reference
from benchmarks.models import GPT2, Trainee
from gptcore import GPT, ops
from gptcore.training.optim import AdamW

Compare = Callable[..., None]
HALVES = [torch.bfloat16, torch.float16]
SHORT = pick((2, 16), (1, 32))  # a batch for PyTorch's bfloat16 where it multiplies a few GFLOP in a second


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def bench_linear(dtype: torch.dtype, compare: Compare) -> None:
    rows, inner, outer = pick((16, 32, 64), (1024, 768, 3072))
    tensors = [torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer), torch.randn(rows, outer)]
    ours, theirs = (
        forward_backward(linear, [t.to(kind).requires_grad_() for t in tensors[:3]], [tensors[3].to(kind)])
        for linear, kind in ((ops.linear, dtype), (reference(F.linear), torch.float32))
    )
    compare(
        f"linear layer forward + backward {name_of(dtype)} against float32", f"{rows} x {inner} to {outer}",
        ours, theirs, against=f"{PYTORCH} in float32", limit=measure.matmul(torch.float32),
        flops=6 * rows * inner * outer,
    )  # fmt: skip


def bench_step(compare: Compare) -> None:
    batch = pick((2, 16), (1, 256))
    sides = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = GPT(GPT2)
        sides.append(Trainee(model, AdamW(model.parameters(), lr=1e-4), batch, dtype))
    compare(
        "GPT-2 124M training step, bfloat16 autocast against float32", "batch {} x {}".format(*batch), *sides,
        against="float32",
    )  # fmt: skip


@pytest.mark.skipif(measure.has_bfloat16(), reason="bench_training compares with instructions for bfloat16")
def bench_step_against_transformers(compare: Compare) -> None:
    ours, theirs = pair(torch.bfloat16, batch=SHORT)
    compare(
        "GPT-2 124M step without bfloat16 instructions", "batch {} x {}".format(*SHORT), ours, theirs,
        against="transformers",
    )  # fmt: skip
