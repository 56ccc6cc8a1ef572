"""Tiles of one head of a (batch, heads, length, head_dim) tensor, and the order in which programs process heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import cache_bytes
from gptcore.kernels.numerics import narrow

# A view is a tuple: the pointer to (batch, heads, length, head_dim), and the strides of the first three dimensions.


@triton.jit
def head_rows(view, batch, head):
    """Return the pointer to the rows of one head and their stride, in int64: tensors may exceed 2^31 elements."""
    return view[0] + batch.to(tl.int64) * view[1] + head.to(tl.int64) * view[2], view[3]


@triton.jit
def row_pointers(rows_of_head, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    return rows_of_head[0] + rows[:, None] * rows_of_head[1] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def inside(first, length, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the mask of the elements of a tile that are inside the tensor."""
    rows = (first + tl.arange(0, ROWS) < length)[:, None]
    columns = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if HEAD_DIM == BLOCK_D:
        return rows
    elif MASK_ROWS:
        return rows & columns
    else:
        return columns


@triton.jit
def load_tile(rows_of_head, first, length, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr,
          BLOCK_D: tl.constexpr):  # fmt: skip
    """Load a tile (ROWS, BLOCK_D), zero outside the tensor."""
    pointers = row_pointers(rows_of_head, first, ROWS, BLOCK_D)
    if MASK_ROWS or HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=inside(first, length, HEAD_DIM, MASK_ROWS, ROWS, BLOCK_D), other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(rows_of_head, tile, first, length, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = row_pointers(rows_of_head, first, ROWS, BLOCK_D)
    mask = inside(first, length, HEAD_DIM, True, ROWS, BLOCK_D)
    tl.store(pointers, narrow(tile, pointers.dtype.element_ty), mask=mask)


@triton.jit
def head_and_tile(program, tiles, heads, heads_per_wave):
    """Return the head and tile of a program in a grid of heads x tiles.

    Heads of one wave are interleaved, tile 0 of all of them first: tiles are ordered by decreasing work, so the longest
    start first. What the programs of a wave read stays in the cache.
    """
    first = program // (heads_per_wave * tiles) * heads_per_wave
    in_wave, wave_heads = program - first * tiles, tl.minimum(heads - first, heads_per_wave)
    return first + in_wave % wave_heads, in_wave // wave_heads


def head_counts(q: Tensor, k: Tensor, keys: bool = False) -> tuple[int, int, int, int]:
    """Return the number of query heads in the batch, in one row of it, and per head of keys; and heads_per_wave.

    heads_per_wave is the number of heads (of keys if `keys`, else of queries) whose columns fit into a quarter of the
    cache, for waves of equal size (kernels/cuda/policy.h).
    """
    batch, query_heads, query_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = query_heads // kv_heads  # 0 without query heads
    heads = batch * (kv_heads if keys else query_heads)
    head_bytes = 2 * head_dim * q.element_size() * (query_len * group if keys else kv_len // max(1, group))
    fit = max(1, cache_bytes(q.device) // 4 // max(1, head_bytes))
    per_wave = triton.cdiv(heads, max(1, triton.cdiv(heads, fit)))
    return batch * query_heads, query_heads, group, max(1, per_wave)
