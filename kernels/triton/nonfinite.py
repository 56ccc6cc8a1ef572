"""NaN and infinities in attention: a row of Q, K, V or dO that is not finite reaches only the rows that attend to it.

In a masked block every column is multiplied for all rows of the tile, and 0 x NaN is NaN. The loops of the kernels
ignore this. A program whose results are not finite sums those elements again, row by row, over the columns that the row
attends to, as in kernels/cuda/nonfinite.cuh.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptcore.kernels.heads import head_rows, load_tile, row_pointers
from gptcore.kernels.masks import is_kept, span
from gptcore.kernels.numerics import LOG2E, narrow

COLUMNS = tl.constexpr(16)  # in one step: bounds the registers


@triton.jit
def any_nonfinite(tile):
    # Over both axes at once: Triton 3.7 cannot compile two sums, one after the other, of a tile in tensor memory.
    return tl.sum(tile * 0.0) != 0.0  # x * 0 is 0 or NaN


@triton.jit
def sum_nonfinite(
    result,  # rows of one head of the results, which were stored
    a1,  # rows of one head: S = a1 b1^T
    a2,  # rows of one head: dP = a2 b2^T; None without DS
    b1,  # view of the columns of S
    b2,  # view of the columns of dP
    lse,  # *float32 (B, H, Tq)
    delta,  # *float32 (B, H, Tq), or None without DS
    batch,
    column_head,  # first head of b1 and b2
    batch_head,  # batch x H + head of the first queries
    heads,  # of b1 and b2 that share the rows
    first_row, side, dropout, scale,
    factor,  # of the sums
    DS: tl.constexpr,  # the sums are of dS b1, for dQ and dK; else of P b2, for out and dV
    KEY_ROWS: tl.constexpr,  # rows are keys
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum those elements of a tile of results again that are not finite."""
    _spans, length, other, _window_left, _window_right = side
    tl.debug_barrier()  # the results are in global memory
    for row in range(first_row, tl.minimum(first_row + ROWS, length)):
        stored = load_tile(result, row, row + 1, HEAD_DIM, True, 1, BLOCK_D).to(tl.float32)
        tl.debug_barrier()  # before a warp overwrites them
        lost = stored - stored != 0.0
        a1_row = load_tile(a1, row, row + 1, HEAD_DIM, True, 1, BLOCK_D).to(tl.float32)
        first, end = span(row, side)
        total = tl.zeros((1, BLOCK_D), tl.float32)
        for i in range(heads):
            stats = (batch_head + i).to(tl.int64) * (other if KEY_ROWS else length)
            b1_rows, b2_rows = head_rows(b1, batch, column_head + i), head_rows(b2, batch, column_head + i)
            column = first
            while (column < end) & (tl.max((lost & (total == total)).to(tl.int32)) > 0):
                columns = column + tl.arange(0, COLUMNS)
                queries, keys = (columns, row) if KEY_ROWS else (row, columns)
                inside = columns < end
                b1_tile = load_tile(b1_rows, column, end, HEAD_DIM, True, COLUMNS, BLOCK_D).to(tl.float32)
                b2_tile = load_tile(b2_rows, column, end, HEAD_DIM, True, COLUMNS, BLOCK_D).to(tl.float32)
                # Columns beyond the range read the statistics of the row's first one; their weight is 0.
                at = stats + (tl.where(inside, columns, first) if KEY_ROWS else row)
                weights = tl.exp2((tl.sum(a1_row * b1_tile, 1) * scale - tl.load(lse + at)) * LOG2E)
                kept = 1.0
                if dropout is not None:
                    kept = is_kept(dropout, batch_head + i, queries, keys).to(tl.float32) * dropout[2]
                if DS:
                    a2_row = load_tile(a2, row, row + 1, HEAD_DIM, True, 1, BLOCK_D).to(tl.float32)
                    weights *= tl.sum(a2_row * b2_tile, 1) * kept - tl.load(delta + at)
                else:
                    weights *= kept
                values = b1_tile if DS else b2_tile
                total += tl.sum(tl.where(inside, weights, 0.0)[:, None] * values, 0)[None, :]
                column += COLUMNS
        pointers = row_pointers(result, row, 1, BLOCK_D)
        tl.store(pointers, narrow(total * factor, pointers.dtype.element_ty), mask=lost)
