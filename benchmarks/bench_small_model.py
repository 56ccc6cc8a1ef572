"""Training steps of nanoGPT's small model for CPUs, against plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import name_of, pick
from benchmarks.models import NO_DROPOUT, PARTS, Trainee, difference, in_parts, matmuls, named
from gptcore import GPT, GPTConfig
from gptcore.ops.attention import Settings
from gptcore.ops.registry import BACKENDS, FLOATS, Backend
from gptcore.training.optim import AdamW

Compare = Callable[..., None]
SMALL = GPTConfig(vocab_size=65, n_positions=64, n_embd=pick(32, 128), n_layer=pick(1, 4), n_head=4, **NO_DROPOUT)
SMALL_BATCH = pick((2, 8), (12, 64))


def fused_pytorch() -> str:
    """Register a backend of PyTorch's own fused operations and return its name; `torch` runs unfused formulas."""

    def attention(qkv: Tensor, _k: None, _v: None, settings: Settings) -> tuple[Tensor, None]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=settings.causal, scale=settings.scale)
        return out.transpose(1, 2), None  # (B, T, H, D)

    def layer_norm(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, out_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(out_dtype or total.dtype), total

    def gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate="tanh" if tanh else "none")

    mine: dict[str, Callable[..., Any]] = {"attention": attention, "layer_norm": layer_norm, "gelu": gelu}
    implementations = {**BACKENDS["torch"].implementations, **mine}
    BACKENDS["fused"] = Backend("fused", devices=("cpu",), dtypes=FLOATS, implementations=implementations)
    return "fused"


def small_pair(
    config: GPTConfig, batch: tuple[int, int], ours: torch.dtype, weights: torch.dtype, theirs: torch.dtype, fused: bool
) -> tuple[Trainee, Trainee]:
    """Return the model with our kernels and optimizer, and a copy with PyTorch's and float32 weights."""
    torch.manual_seed(0)
    model = GPT(config)
    other = copy.deepcopy(model)
    model.to(weights)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=fused)
    reference = Trainee(other, optimizer, batch, theirs, backend=fused_pytorch() if fused else "torch")
    return Trainee(model, AdamW(model.parameters(), lr=1e-4), batch, ours), reference


F32, BF16 = torch.float32, torch.bfloat16
OPS, FUSED = 'ops.use("torch")', "PyTorch's fused operations"


@pytest.mark.parametrize(
    ("ours", "weights", "theirs", "fused"),
    [
        (F32, F32, F32, False),
        (BF16, F32, BF16, False),
        (BF16, BF16, BF16, False),
        (BF16, BF16, F32, False),
        (F32, F32, F32, True),
        (BF16, BF16, BF16, True),
    ],
)
def bench_small_model(
    ours: torch.dtype, weights: torch.dtype, theirs: torch.dtype, fused: bool, compare: Compare
) -> None:
    """Time the model of nanoGPT's README: 4 layers, 4 heads, width 128, block 64, batch 12, 65 characters.

    The references are ops.use("torch") with the default torch.optim.AdamW, and PyTorch's fused operations with its
    fused AdamW, its fastest without torch.compile.
    """
    pair = small_pair(SMALL, SMALL_BATCH, ours, weights, theirs, fused)
    against = (FUSED if fused else OPS) + (f" in {name_of(theirs)}" if theirs is not ours else "")
    extra: dict[str, Any] = {"tokens": SMALL_BATCH[0] * SMALL_BATCH[1]}
    compare(
        f"small model training step {named(ours, weights)}", f"against {against}", *pair,
        against=FUSED if fused else OPS, limit=matmuls(SMALL, SMALL_BATCH[0] * SMALL_BATCH[1], ours), extra=extra,
    )  # fmt: skip
    extra["loss difference"] = difference(*pair)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weights", [F32, BF16])
def bench_parts(weights: torch.dtype, part: str, compare: Compare) -> None:
    """Time a step without some of its parts, against the whole step: the difference is their time."""
    compare(
        f"small model step with parts removed {named(BF16, weights)}", part,
        *in_parts(SMALL, SMALL_BATCH, BF16, part, weights), against="the whole step",
        limit=matmuls(SMALL, SMALL_BATCH[0] * SMALL_BATCH[1], BF16),
    )  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
def bench_python_overhead(fused: bool, compare: Compare) -> None:
    """Time four layers on tiny tensors: the time is that of Python, dispatch, autograd and waking threads.

    Batch 1 of two tokens, width 32: 0.3 million multiplications in a step, which take microseconds.
    """
    config = GPTConfig(vocab_size=65, n_positions=64, n_embd=32, n_layer=4, n_head=4, **NO_DROPOUT)
    pair = small_pair(config, (1, 2), F32, F32, F32, fused)
    against = FUSED if fused else OPS
    compare("overhead of a small model's step", f"against {against}", *pair, against=against)
