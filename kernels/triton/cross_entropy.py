"""Cross entropy of rows of logits in Triton; the gradient overwrites the logits.

Bound by memory bandwidth: a row is read twice, the second time mostly from the L2 cache, and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import INTERPRETED, Tile, launch
from gptcore.kernels.numerics import narrow

INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    logits,  # * (rows, stride), of which vocab columns count; their gradient if GRADIENT, and zeros after them: written
    targets,  # *int64 (rows,)
    losses,  # *float32 (rows,): -log softmax(logits)[target], or 0 for ignore_index: written
    rows,
    stride,
    vocab,
    ignore_index,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    target = tl.load(targets + row, mask=row < rows, other=ignore_index)
    counted = (row < rows) & (target != ignore_index)
    start = logits + row.to(tl.int64) * stride
    highest = tl.full((ROWS, 1), -INFINITY, tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    picked = tl.zeros((ROWS, 1), tl.float32)
    # Whole vectors up to the stride: a mask that ends at an odd column would divide every access
    for first in range(0, stride, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        tile = tl.load(start + column, mask=counted & (column < stride), other=0.0).to(tl.float32)
        tile = tl.where(column < vocab, tile, -INFINITY)
        new = tl.maximum(highest, tl.max(tile, 1)[:, None])
        base = tl.where(new == -INFINITY, 0.0, new)  # -inf so far: the difference would be NaN
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(tile - base), 1)[:, None]
        picked += tl.sum(tl.where(column == target, tile, 0.0), 1)[:, None]
        highest = new
    # A target outside of the vocabulary gives NaN: raising an error would synchronise
    total = tl.where((target >= 0) & (target < vocab), total, float("nan"))
    loss = tl.log(total) - (picked - highest)
    tl.store(losses + row, tl.where(counted, loss, 0.0), mask=row < rows)
    if GRADIENT:
        for first in range(0, stride, COLUMNS):
            column = (first + tl.arange(0, COLUMNS))[None, :]
            tile = tl.load(start + column, mask=counted & (column < stride), other=0.0).to(tl.float32)
            tile = tl.where(column < vocab, tile, -INFINITY)
            tile = tl.exp(tile - highest) / total - tl.where(column == target, 1.0, 0.0)
            tile = narrow(tl.where(counted & (column < vocab), tile, 0.0), logits.dtype.element_ty)
            tl.store(start + column, tile, mask=(row < rows) & (column < stride))


@triton.jit(do_not_specialize=["rows"])
def _mean_kernel(
    losses,  # *float32 (rows,)
    targets,  # *int64 (rows,)
    mean,  # *float32 (): over the targets that are not ignore_index: written
    scale,  # *float32 (): 1 / their number, 1 for none: written
    rows,
    ignore_index,
    ROWS: tl.constexpr,
):
    sums = tl.zeros((ROWS,), tl.float32)
    counts = tl.zeros((ROWS,), tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        sums += tl.load(losses + row, mask=row < rows, other=0.0)
        counts += (tl.load(targets + row, mask=row < rows, other=ignore_index) != ignore_index).to(tl.int32)
    factor = 1.0 / tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    tl.store(scale, factor)
    tl.store(mean, tl.sum(sums, 0) * factor)


def forward(
    logits: Tensor, targets: Tensor, losses: Tensor, vocab: int, ignore_index: int, gradient: bool
) -> None:  # fmt: skip
    """Write the losses of dense logits (rows, stride), and with `gradient` their gradients into the logits."""
    rows, stride = logits.shape
    tile = Tile(16, 1024, 4, 1) if INTERPRETED else Tile(1, 4096, 8, 1)
    launch(
        _forward_kernel, [tile], ("ROWS", "COLUMNS"), lambda tile: triton.cdiv(rows, tile.rows),
        logits, targets, losses, rows, stride, vocab, ignore_index, like=logits, GRADIENT=gradient,
    )  # fmt: skip


def mean(losses: Tensor, targets: Tensor, mean: Tensor, scale: Tensor, ignore_index: int) -> None:
    """Write the mean of the losses whose targets count, and 1 / their number; without any, 0 and 1."""
    launch(
        _mean_kernel, [Tile(1024, 1, 4, 1)], ("ROWS",), lambda _: 1,
        losses, targets, mean, scale, len(losses), ignore_index, like=losses,
    )  # fmt: skip
