"""GELU in Triton, with a fused bias, forward and backward.

Bound by memory bandwidth: the backward reads x again and recomputes the function.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import Tile, launch, processors
from gptcore.kernels.numerics import narrow
from gptcore.kernels.rows import block_of, rows_and_width, sum_rows

SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SATURATED = tl.constexpr(32.0)  # beyond +-32 the function is 0 or x


@triton.jit
def _clamp_below(x):
    """Return max(x, -32), NaN for NaN: -inf does not become NaN in a product with 0."""
    return tl.where(x < -SATURATED, -SATURATED, x)


@triton.jit
def _curve(x, TANH_FORM: tl.constexpr):
    """Return gelu(x) / x and the derivative of it times x, without NaN at infinities."""
    x = tl.where(x > SATURATED, SATURATED, _clamp_below(x))
    if TANH_FORM:
        square = x * x
        # (1 + tanh u) / 2 is the sigmoid of 2u, which does not cancel for negative x.
        curve = tl.sigmoid(x * SQRT_8_OVER_PI * (1.0 + 0.044715 * square))
        return curve, x * curve * (1.0 - curve) * (1.0 + 3.0 * 0.044715 * square) * SQRT_8_OVER_PI
    else:
        return 0.5 + 0.5 * tl.erf(x * SQRT_HALF), x * tl.exp(-0.5 * x * x) * INV_SQRT_2PI


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,  # * (rows, width)
    bias,  # *float32 (width,) or None
    out,  # * (rows, width): written
    rows,
    width,
    TANH_FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    offsets = row.to(tl.int64) * width + column
    wide = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        wide += tl.load(bias + column, mask=column < width, other=0.0)
    curve, _slope = _curve(wide, TANH_FORM)
    tl.store(out + offsets, narrow(_clamp_below(wide) * curve, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward_kernel(
    grad_out,  # * (rows, width)
    x,  # * (rows, width)
    bias,  # *float32 (width,) or None
    grad_x,  # * (rows, width): written
    partials,  # *float32 (programs, width): sums of grad_x over the rows of a program, written if there is a bias
    rows,
    width,
    programs,  # that share the rows
    TANH_FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0) % programs
    column = (tl.program_id(0) // programs * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    if bias is not None:
        bias_tile = tl.load(bias + column, mask=column < width, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < width)
        offsets = row.to(tl.int64) * width + column
        wide = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            wide += bias_tile
        curve, slope = _curve(wide, TANH_FORM)
        grad = tl.load(grad_out + offsets, mask=inside, other=0.0).to(tl.float32) * (curve + slope)
        tl.store(grad_x + offsets, narrow(grad, grad_x.dtype.element_ty), mask=inside)
        total += grad
    if bias is not None:
        tl.store(partials + program.to(tl.int64) * width + column, tl.sum(total, 0)[None, :], mask=column < width)


def _tile(width: int) -> Tile:
    columns = block_of(width, 1024)
    return Tile(max(1, 1024 // columns), columns, 4, 2)


# The arguments are those of the native functions gelu_forward and gelu_backward, which check them.


def forward(x: Tensor, bias: Tensor | None, out: Tensor, tanh_form: bool) -> None:
    """Write out."""
    rows, width = rows_and_width(x)
    launch(
        _forward_kernel, [_tile(width)], ("ROWS", "COLUMNS"),
        lambda tile: triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),
        x, bias, out, rows, width, like=x, TANH_FORM=tanh_form,
    )  # fmt: skip


def backward(
    grad_out: Tensor, x: Tensor, bias: Tensor | None, grad_x: Tensor, grad_bias: Tensor | None, tanh_form: bool
) -> None:
    """Write grad_x and, with a bias, grad_bias."""
    rows, width = rows_and_width(x)
    tile = _tile(width)
    blocks = triton.cdiv(width, tile.columns)
    programs = min(triton.cdiv(rows, tile.rows), max(1, 16 * processors(x.device) // max(1, blocks)))
    partials = x.new_empty((1, programs, width) if bias is not None else (1, 0, 0), dtype=torch.float32)
    launch(
        _backward_kernel, [tile], ("ROWS", "COLUMNS"), lambda tile: programs * blocks,
        grad_out, x, bias, grad_x, partials, rows, width, programs, like=x, TANH_FORM=tanh_form,
    )  # fmt: skip
    if grad_bias is not None:
        sum_rows(partials, grad_bias)
