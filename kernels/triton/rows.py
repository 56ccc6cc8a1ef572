"""Shared by the kernels over the rows of a matrix: the division of a row into blocks, and sums over all rows."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import INTERPRETED, Tile, launch
from gptcore.kernels.numerics import narrow


def rows_and_width(tensor: Tensor) -> tuple[int, int]:
    """Return the shape of a tensor (..., width) as a matrix; (1, 1) for a scalar."""
    return math.prod(tensor.shape[:-1]), (*tensor.shape, 1)[max(0, tensor.dim() - 1)]


def block_of(width: int, largest: int) -> int:
    """Return the largest power of two whose multiples exceed a width by at most an eighth, the share of idle lanes."""
    block = min(triton.next_power_of_2(max(1, width)), largest)
    while block > 128 and triton.cdiv(width, block) * block * 8 > width * 9:
        block //= 2
    return block


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(
    partials,  # *float32 (count, width), or two such
    total,  # * (width,): the sum of the first, written
    other,  # * (width,): that of the second, or None
    count,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    half = tl.program_id(0) // blocks
    partials += half.to(tl.int64) * count * width
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        rows = (first + tl.arange(0, ROWS))[:, None]
        inside = (rows < count) & (columns < width)
        acc += tl.load(partials + rows.to(tl.int64) * width + columns, mask=inside, other=0.0)
    out = narrow(tl.sum(acc, 0)[None, :], total.dtype.element_ty)
    if half == 0:
        tl.store(total + columns, out, mask=columns < width)
    elif other is not None:
        tl.store(other + columns, out, mask=columns < width)


def sum_rows(partials: Tensor, total: Tensor, other: Tensor | None = None) -> None:
    """Write the sums of partials (1 or 2, count, width) over `count`, always in the same order."""
    _, count, width = partials.shape
    launch(
        _sum_kernel, [Tile(32, 1024 if INTERPRETED else 32, 4, 2)], ("ROWS", "COLUMNS"),
        lambda tile: triton.cdiv(width, tile.columns) * (1 if other is None else 2),
        partials, total, other, count, width, like=partials,
    )  # fmt: skip
