"""Layer norm in Triton, with a fused residual addition, forward and backward.

A row is divided into blocks, so that few lanes idle at widths that are not a power of two, and is kept in registers.
Rows too wide for that are read again from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import Tile, launch, processors
from gptcore.kernels.numerics import narrow
from gptcore.kernels.rows import block_of, rows_and_width, sum_rows

# The widest rows kept in registers: the forward holds one row, the backward two rows and two sums over rows.
HELD_FORWARD, HELD_BACKWARD = 32768, 8192
# With fused multiply-adds g - mean(g) would subtract a rounded mean from the exact product g = dy weight, and not be 0
# in rows of one element.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _columns(i, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = (i * BLOCK + tl.arange(0, BLOCK))[None, :]
    return columns, columns < WIDTH


@triton.jit
def _load(matrix, row, rows, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load block i of some rows in float32, zero outside."""
    columns, inside = _columns(i, WIDTH, BLOCK)
    return tl.load(matrix + row * WIDTH + columns, mask=(row < rows) & inside, other=0.0).to(tl.float32)


@triton.jit
def _load_row(vector, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load block i of weight or bias in float32."""
    columns, inside = _columns(i, WIDTH, BLOCK)
    return tl.load(vector + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(matrix, tile, row, rows, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns, inside = _columns(i, WIDTH, BLOCK)
    tile = narrow(tile, matrix.dtype.element_ty)
    tl.store(matrix + row * WIDTH + columns, tile, mask=(row < rows) & inside)


@triton.jit
def _mean(sums, WIDTH: tl.constexpr):
    return tl.sum(sums, 1)[:, None] * (1.0 / WIDTH)  # a division needs more registers, or is less accurate


@triton.jit
def _sum(x, residual, residual_out, row, rows, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return block i of residual_out = x + residual, rounded: the backward reads it, so the statistics are of it."""
    tile = _load(x, row, rows, i, WIDTH, BLOCK)
    if residual is None:
        return tile
    else:
        return narrow(tile + _load(residual, row, rows, i, WIDTH, BLOCK), residual_out.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,  # * (rows, WIDTH)
    weight,  # * (WIDTH,)
    bias,  # * (WIDTH,) or None
    residual,  # * (rows, WIDTH) or None
    out,  # * (rows, WIDTH): written, in a dtype of its own
    residual_out,  # * (rows, WIDTH): x + residual, written if there is a residual
    mean,  # *float32 (rows,): written
    rstd,  # *float32 (rows,): 1 / standard deviation, written
    rows,
    eps,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    held = ()
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(BLOCKS):
        tile = _sum(x, residual, residual_out, row, rows, i, WIDTH, BLOCK)
        if residual is not None:
            _store(residual_out, tile, row, rows, i, WIDTH, BLOCK)
        acc += tile
        held = held + (tile,)
    first_mean = _mean(acc, WIDTH)

    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(BLOCKS):
        tile = held[i] if HELD else _sum(x, residual, residual_out, row, rows, i, WIDTH, BLOCK)
        _all, inside = _columns(i, WIDTH, BLOCK)
        centred = tl.where(inside, tile - first_mean, 0.0)
        sums += centred
        squares += centred * centred
    rest = _mean(sums, WIDTH)  # the rounding error of the mean
    mean_square = _mean(squares, WIDTH)
    variance = tl.maximum(mean_square - rest * rest, 0.0)
    overflow = mean_square - mean_square  # NaN if the squares overflow: the row must not become zeros
    row_rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps + overflow))
    tl.store(mean + row, first_mean + rest, mask=row < rows)
    tl.store(rstd + row, row_rstd, mask=row < rows)

    for i in tl.static_range(BLOCKS):
        tile = held[i] if HELD else _sum(x, residual, residual_out, row, rows, i, WIDTH, BLOCK)
        tile = ((tile - first_mean) * row_rstd - rest * row_rstd) * _load_row(weight, i, WIDTH, BLOCK)
        if bias is not None:
            tile += _load_row(bias, i, WIDTH, BLOCK)
        _store(out, tile, row, rows, i, WIDTH, BLOCK)


@triton.jit
def _normal(
    total, grad_out, weight, row_mean, row_rstd, row, rows, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return block i of the normalised rows, of their gradient, and of the gradient times weight."""
    grad = _load(grad_out, row, rows, i, WIDTH, BLOCK)
    x_hat = (_load(total, row, rows, i, WIDTH, BLOCK) - row_mean) * row_rstd
    return x_hat, grad, grad * _load_row(weight, i, WIDTH, BLOCK)


@triton.jit
def _sum_over_rows(partials, tile, i, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    columns, inside = _columns(i, WIDTH, BLOCK)
    total = tl.sum(tile, 0)[None, :]
    if ADD:
        total += tl.load(partials + columns, mask=inside, other=0.0)
    tl.store(partials + columns, total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_out,  # * (rows, WIDTH)
    grad_residual_out,  # * (rows, WIDTH): the gradient of residual_out, or None
    total,  # * (rows, WIDTH): the normalised tensor, residual_out or x
    weight,  # * (WIDTH,)
    mean,  # *float32 (rows,)
    rstd,  # *float32 (rows,)
    grad_x,  # * (rows, WIDTH): written
    grad_narrow,  # * (rows, WIDTH): the same in the dtype of grad_out, or None: written
    weight_partials,  # *float32 (programs, WIDTH): gradients from the rows of a program; not HELD: zero before; written
    bias_partials,  # *float32 (programs, WIDTH): likewise, or None
    rows,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    weight_partials += program.to(tl.int64) * WIDTH
    if bias_partials is not None:
        bias_partials += program.to(tl.int64) * WIDTH
    weight_sums, bias_sums = (), ()
    for _ in tl.static_range(BLOCKS if HELD else 0):
        weight_sums = weight_sums + (tl.zeros((ROWS, BLOCK), tl.float32),)
        bias_sums = bias_sums + (tl.zeros((ROWS, BLOCK), tl.float32),)

    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        row_mean = tl.load(mean + row, mask=row < rows, other=0.0)
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)
        # dx = rstd (g - mean(g) - n mean(g n)), where n is the normalised row and g = dy weight
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        x_hats, gs, new_weight_sums, new_bias_sums = (), (), (), ()
        for i in tl.static_range(BLOCKS):
            x_hat, grad, g = _normal(total, grad_out, weight, row_mean, row_rstd, row, rows, i, WIDTH, BLOCK)
            sums += g
            products += g * x_hat
            x_hats, gs = x_hats + (x_hat,), gs + (g,)
            if HELD:
                new_weight_sums = new_weight_sums + (weight_sums[i] + grad * x_hat,)
                new_bias_sums = new_bias_sums + (bias_sums[i] + grad,)
            else:
                _sum_over_rows(weight_partials, grad * x_hat, i, WIDTH, BLOCK, True)
                if bias_partials is not None:
                    _sum_over_rows(bias_partials, grad, i, WIDTH, BLOCK, True)
        weight_sums, bias_sums = new_weight_sums, new_bias_sums
        mean_g, mean_product = _mean(sums, WIDTH), _mean(products, WIDTH)
        for i in tl.static_range(BLOCKS):
            if HELD:
                x_hat, g = x_hats[i], gs[i]
            else:
                x_hat, grad, g = _normal(total, grad_out, weight, row_mean, row_rstd, row, rows, i, WIDTH, BLOCK)
            tile = (g - (mean_g + x_hat * mean_product)) * row_rstd
            if grad_residual_out is not None:
                tile += _load(grad_residual_out, row, rows, i, WIDTH, BLOCK)
            _store(grad_x, tile, row, rows, i, WIDTH, BLOCK)
            if grad_narrow is not None:
                _store(grad_narrow, tile, row, rows, i, WIDTH, BLOCK)
        if not HELD:
            tl.debug_barrier()  # the partial sums are read in the next iteration, possibly by other threads

    for i in tl.static_range(BLOCKS if HELD else 0):
        _sum_over_rows(weight_partials, weight_sums[i], i, WIDTH, BLOCK, False)
        if bias_partials is not None:
            _sum_over_rows(bias_partials, bias_sums[i], i, WIDTH, BLOCK, False)


def _tile(width: int, held: bool, lane: int) -> Tile:
    """Return the tile: several rows only if they are narrow; `lane` elements of a row per lane."""
    block = block_of(width, 256 if width <= 1024 else 1024 if held else 4096)
    padded = triton.cdiv(width, block) * block
    rows = max(1, 512 // padded)
    warps = triton.next_power_of_2(triton.cdiv(rows * padded, 32 * lane))
    if warps > 8:  # more elements per lane instead of more warps
        warps = max(8, min(warps, triton.next_power_of_2(triton.cdiv(padded, 64 * lane))))
    return Tile(rows, block, max(2, warps) if held else 32, 1)


# The arguments are those of the native functions layer_norm_forward and layer_norm_backward, which check them.


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, out: Tensor, residual_out: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float,
) -> None:  # fmt: skip
    """Write out, residual_out if there is a residual, mean and rstd."""
    rows, width = rows_and_width(x)
    held = width <= HELD_FORWARD
    launch(
        _forward_kernel, [_tile(width, held, 32)], ("ROWS", "BLOCK"), lambda tile: triton.cdiv(rows, tile.rows),
        x, weight, bias, residual, out, residual_out, mean, rstd, rows, eps, like=x, WIDTH=width, HELD=held, **OPTIONS,
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_residual_out: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    grad_x: Tensor, grad_narrow: Tensor | None, grad_weight: Tensor, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write grad_x (also the gradient of the residual), grad_narrow if given, grad_weight and grad_bias."""
    rows, width = rows_and_width(total)
    held = width <= HELD_BACKWARD
    tile = _tile(width, held, 20)
    # As many programs as are resident, if their sums leave registers for 16 warps
    programs = min(triton.cdiv(rows, tile.rows), max(1, (16 if held else 64) // tile.warps) * processors(total.device))
    new = torch.empty if held else torch.zeros
    partials = new(1 if grad_bias is None else 2, programs, width, dtype=torch.float32, device=weight.device)
    launch(
        _backward_kernel, [tile], ("ROWS", "BLOCK"), lambda tile: programs,
        grad_out, grad_residual_out, total, weight, mean, rstd, grad_x, grad_narrow, partials[0],
        None if grad_bias is None else partials[1], rows, like=total, WIDTH=width, HELD=held, **OPTIONS,
    )  # fmt: skip
    sum_rows(partials, grad_weight, grad_bias)
