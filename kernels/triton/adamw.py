"""AdamW for many tensors in one launch: clipping, master weights and the rounded parameters in one pass over memory.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import Tile, launch
from gptcore.kernels.numerics import narrow

PIECE = 1 << 16  # elements of a program
COLUMNS = tl.constexpr(7)  # of the table
BITS = tl.constexpr(24)  # a step counts up to 2^24, where float32 ends to
TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _correction(BETA: tl.constexpr, step):
    """Return 1 - BETA^step, multiplied in float64: in float32 the first steps would cancel."""
    power = tl.full((), 1.0, tl.float64)
    base = tl.full((), BETA, tl.float64)
    count = step.to(tl.int32)
    for bit in tl.static_range(BITS):
        power = tl.where(((count >> bit) & 1) == 1, power * base, power)
        base = base * base
    return (1.0 - power).to(tl.float32)


@triton.jit(do_not_specialize=["scale", "lr", "decay"])
def _kernel(
    table,  # *int64 (tensors, 7): addresses of parameter, master, gradient, exp_avg, exp_avg_sq and step; elements
    pieces,  # *int64 (programs, 2): tensor and first element of a program
    grad_scale,  # *float32 (), or None
    found_inf,  # *float32 (): unless it is 0, nothing is written; or None
    scale,
    lr,
    decay,  # 1 - lr * weight_decay
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    T: tl.constexpr,  # of parameters and gradients
    MASTERS: tl.constexpr,  # float32 masters are updated, and parameters are their rounding
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table + tl.load(pieces + 2 * tl.program_id(0)) * COLUMNS
    first = tl.load(pieces + 2 * tl.program_id(0) + 1)
    parameter = tl.load(row).to(tl.pointer_type(T))
    master = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + 2).to(tl.pointer_type(T))
    exp_avg = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)))  # counts this one
    end = tl.minimum(tl.load(row + 6), first + PIECE)
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0.0, end, first)
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    size = lr / _correction(BETA1, step)
    root = tl.sqrt_rn(_correction(BETA2, step))
    for begin in range(first, end, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < end
        value = tl.load(parameter + at, mask=inside, other=0.0)
        wide = value.to(tl.float32)
        if MASTERS:  # a parameter that is not its rounded master was changed by other code: the update starts from it
            kept = tl.load(master + at, mask=inside, other=0.0)
            wide = tl.where(narrow(kept, T) == value, kept, wide)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * scale
        mean = tl.load(exp_avg + at, mask=inside, other=0.0)
        square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        mean += (1.0 - BETA1) * (g - mean)
        square = BETA2 * square + (1.0 - BETA2) * g * g
        wide = wide * decay - size * mean / (tl.sqrt_rn(square) / root + EPS)
        tl.store(exp_avg + at, mean, mask=inside)
        tl.store(exp_avg_sq + at, square, mask=inside)
        if MASTERS:
            tl.store(master + at, wide, mask=inside)
        tl.store(parameter + at, narrow(wide, T), mask=inside)


Rows = list[list[int]]


def table(
    parameters: Sequence[Tensor], masters: Sequence[Tensor], *others: Sequence[Tensor]
) -> tuple[Rows, Callable[[], Rows]]:
    """Return the kernel's `table`, and a function for its `pieces`, of lists of dense tensors in the table's order."""
    lists = parameters, masters or parameters, *others
    rows = [[*(tensor.data_ptr() for tensor in some), some[0].numel()] for some in zip(*lists, strict=True)]
    return rows, lambda: [[i, at] for i, row in enumerate(rows) for at in range(0, row[-1], PIECE)]


def step(
    table: Tensor,
    pieces: Tensor,
    like: Tensor,
    masters: bool,
    grad_scale: float | Tensor,
    found_inf: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update the tensors of a table; `like` is one of its parameters."""
    on_device = isinstance(grad_scale, Tensor)
    launch(
        _kernel, [Tile(1024, 1, 4, 1)], ("BLOCK",), lambda _: len(pieces),
        table, pieces, grad_scale if on_device else None, found_inf, 1.0 if on_device else grad_scale, lr,
        1.0 - lr * weight_decay, like=like, BETA1=betas[0], BETA2=betas[1], EPS=eps, T=TYPES[like.dtype],
        MASTERS=masters, PIECE=PIECE,
    )  # fmt: skip
