"""Fused softmax-attention in Triton, forward and backward.

"FlashAttention-2" (Dao 2023), deterministic: one kernel owns a tile of queries and computes out or dQ, another owns a
tile of keys and computes dK and dV. No kernel adds to memory that another program writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.heads import head_and_tile, head_counts, head_rows, load_tile, store_tile
from gptcore.kernels.launch import launch, view
from gptcore.kernels.masks import (
    attended,
    block_count,
    blocks_of,
    dropout_mask,
    limits,
    nth_block,
    other_length,
    span,
    spans_of,
)
from gptcore.kernels.nonfinite import any_nonfinite, sum_nonfinite
from gptcore.kernels.numerics import LN2, LOG2E, dot, narrow
from gptcore.kernels.tiles import tiles

# Arguments that vary between calls: a kernel is not specialised for their values, as it would be for those of a tuple.
# The kernels therefore cannot share one tuple of arguments, and each lists them.
CALL = [
    "query_len", "kv_len", "window_left", "window_right", "seed", "dropout_threshold", "dropout_scale", "batch_heads",
    "query_heads", "group", "heads_per_wave", "scale",
]  # fmt: skip


# ---- the tile of a program -------------------------------------------------------------------------------------------


@triton.jit
def _tile(length, batch_heads, heads, heads_per_wave, LAST_FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Return batch x head, batch, head and first row of this program's tile.

    LAST_FIRST takes the last tile first: of queries it has the most work if causal, of keys the first tile has.
    """
    tiles = tl.cdiv(length, ROWS)
    batch_head, tile = head_and_tile(tl.program_id(0), tiles, batch_heads, heads_per_wave)
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return batch_head, batch_head // heads, batch_head % heads, tile * ROWS


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_block(
    state, q, k, v, block, first_query, side, dropout, batch_head, factor,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Update the online softmax with one block of keys. Scores (QUERIES, KEYS) are not yet multiplied by |scale|."""
    acc, row_sum, row_max = state
    first_key = block * KEYS
    k_tile = load_tile(k, first_key, other_length(side), HEAD_DIM, MASKED, KEYS, BLOCK_D)
    scores = dot(q, tl.trans(k_tile), None, PRECISION)
    if MASKED:
        scores = tl.where(attended(first_query, QUERIES, side, first_key, KEYS), scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max  # -inf - -inf is NaN
    if q.dtype == tl.float32:  # the maximum has a weight of exactly 1
        weights = tl.exp2((scores - base[:, None]) * factor)
    else:  # one fused multiply-add; the rounding error of the shift is the same in all weights of a row
        shift = base * factor
        weights = tl.exp2(scores * factor - shift[:, None])
    rescale = tl.exp2((row_max - base) * factor)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    if dropout is not None:  # the sum is over all keys; dropout_scale is applied at the end
        weights *= dropout_mask(dropout, batch_head, first_query, first_key, QUERIES, KEYS, False)
    v_tile = load_tile(v, first_key, other_length(side), HEAD_DIM, MASKED, KEYS, BLOCK_D)
    acc = dot(narrow(weights, v_tile.dtype), v_tile, acc * rescale[:, None], PRECISION)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=CALL)
def _forward_kernel(
    q,  # view of the queries (B, H, Tq, D)
    k,  # view of the keys (B, H / group, Tk, D)
    v,  # view of the values (B, H / group, Tk, D)
    out,  # view of the output (B, H, Tq, D)
    lse,  # *float32 (B, H, Tq): natural log of the sum of exponentials
    spans,  # *int32 (B, Tq, 2): the range of keys of each query, with documents, or None
    query_len,  # Tq
    kv_len,  # Tk
    window_left,  # keys before its position that a query attends to
    window_right,  # keys after it
    seed,  # of dropout, or None
    dropout_threshold,  # smallest random word with which dropout keeps a weight
    dropout_scale,  # 1 / (1 - dropout_p)
    batch_heads,  # B H
    query_heads,  # H
    group,  # query heads per head of keys
    heads_per_wave,  # heads that are interleaved
    scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch_head, batch, head, first_query = _tile(query_len, batch_heads, query_heads, heads_per_wave, True, QUERIES)
    if spans is not None:
        spans += batch.to(tl.int64) * query_len * 2
    side = spans, query_len, kv_len, window_left, window_right
    dropout = None if seed is None else (seed, dropout_threshold, dropout_scale)
    k_rows, v_rows = head_rows(k, batch, head // group), head_rows(v, batch, head // group)

    # scale = sign x size. q is multiplied by sign, so that the largest score has the largest probability; size
    # multiplies the exponents.
    sign = tl.where(scale > 0.0, 1.0, tl.where(scale < 0.0, -1.0, 0.0))
    size = tl.where(scale == 0.0, 1.0, tl.abs(scale))
    q_tile = load_tile(head_rows(q, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    q_tile = narrow(q_tile.to(tl.float32) * sign, q_tile.dtype)

    acc = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    state = acc, row_sum, row_max
    blocks = blocks_of(first_query, QUERIES, side, KEYS)
    for masked in tl.static_range(2):
        for i in range(block_count(blocks, masked)):
            state = _forward_block(
                state, q_tile, k_rows, v_rows, nth_block(i, blocks, masked), first_query, side, dropout, batch_head,
                size * LOG2E, HEAD_DIM, PRECISION, masked, QUERIES, KEYS, BLOCK_D,
            )  # fmt: skip
    acc, row_sum, row_max = state

    queries = first_query + tl.arange(0, QUERIES)
    first, end = span(queries, side)
    row_sum = tl.where(first < end, row_sum, 1.0)  # a query that attends to no key: output 0, LSE -inf
    acc = acc / row_sum[:, None]
    if dropout is not None:
        acc *= dropout_scale
    store_tile(head_rows(out, batch, head), acc, first_query, query_len, HEAD_DIM, QUERIES, BLOCK_D)
    row_lse = row_max * size + tl.log(row_sum)
    if q_tile.dtype != tl.float32:  # row_sum is relative to the rounded shift
        factor = size * LOG2E
        row_lse -= tl.where(row_max > float("-inf"), tl.fma(row_max, factor, -(row_max * factor)), 0.0) * LN2
    tl.store(lse + batch_head.to(tl.int64) * query_len + queries, row_lse, mask=queries < query_len)
    if any_nonfinite(acc):
        sum_nonfinite(
            head_rows(out, batch, head), head_rows(q, batch, head), None, k, v, lse, None, batch, head // group,
            batch_head, 1, first_query, side, dropout, scale, 1.0, False, False, HEAD_DIM, QUERIES, BLOCK_D,
        )  # fmt: skip


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _products_of_rows(a, b, PRECISION: tl.constexpr):
    """Return the dot product of each row of a with the same row of b.

    In float32 it is the diagonal of a matrix product, which is summed in the order of dP, so that dP - delta is exactly
    0 for a probability of exactly 1. In 16 bits the order does not matter: rounding dS is a larger error.
    """
    if a.dtype == tl.float32:
        rows = tl.arange(0, a.shape[0])
        return tl.sum(tl.where(rows[:, None] == rows[None, :], dot(a, tl.trans(b), None, PRECISION), 0.0), 1)
    else:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _dq_block(
    dq, q, grad, row_lse, delta, k, v, block, first_query, side, dropout, batch_head, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Accumulate dQ / scale over one block of keys."""
    first_key = block * KEYS
    k_tile = load_tile(k, first_key, other_length(side), HEAD_DIM, MASKED, KEYS, BLOCK_D)
    v_tile = load_tile(v, first_key, other_length(side), HEAD_DIM, MASKED, KEYS, BLOCK_D)
    scores = dot(q, tl.trans(k_tile), None, PRECISION)
    weights = tl.exp2((scores * scale - row_lse[:, None]) * LOG2E)
    grad_weights = dot(grad, tl.trans(v_tile), None, PRECISION)
    if dropout is not None:
        grad_weights *= dropout_mask(dropout, batch_head, first_query, first_key, QUERIES, KEYS, False) * dropout[2]
    grad_scores = weights * (grad_weights - delta[:, None])
    if MASKED:  # selected, not multiplied: masked weights may be infinite
        grad_scores = tl.where(attended(first_query, QUERIES, side, first_key, KEYS), grad_scores, 0.0)
    return dot(narrow(grad_scores, k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(do_not_specialize=CALL)
def _dq_kernel(
    grad_out,  # view of the gradient of out (B, H, Tq, D)
    grad_lse,  # *float32 (B, H, Tq): gradient of lse, or None
    q,  # view of the queries (B, H, Tq, D)
    k,  # view of the keys (B, H / group, Tk, D)
    v,  # view of the values (B, H / group, Tk, D)
    out,  # view of the forward's output (B, H, Tq, D)
    lse,  # *float32 (B, H, Tq): the forward's log of the sum of exponentials
    dq,  # view of the gradient of q (B, H, Tq, D): written
    delta,  # *float32 (B, H, Tq): rowsum(dO * O) - dlse, written for the other kernel
    spans,  # *int32 (B, Tq, 2): the range of keys of each query, with documents, or None
    query_len,  # Tq
    kv_len,  # Tk
    window_left,  # keys before its position that a query attends to
    window_right,  # keys after it
    seed,  # of dropout, or None
    dropout_threshold,  # smallest random word with which dropout keeps a weight
    dropout_scale,  # 1 / (1 - dropout_p)
    batch_heads,  # B H
    query_heads,  # H
    group,  # query heads per head of keys
    heads_per_wave,  # heads that are interleaved
    scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch_head, batch, head, first_query = _tile(query_len, batch_heads, query_heads, heads_per_wave, True, QUERIES)
    if spans is not None:
        spans += batch.to(tl.int64) * query_len * 2
    side = spans, query_len, kv_len, window_left, window_right
    dropout = None if seed is None else (seed, dropout_threshold, dropout_scale)

    q_tile = load_tile(head_rows(q, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    grad_tile = load_tile(head_rows(grad_out, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    out_tile = load_tile(head_rows(out, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    row_delta = _products_of_rows(grad_tile, out_tile, PRECISION)
    queries = first_query + tl.arange(0, QUERIES)
    rows = batch_head.to(tl.int64) * query_len + queries
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + rows, mask=queries < query_len, other=0.0)
    tl.store(delta + rows, row_delta, mask=queries < query_len)
    row_lse = tl.load(lse + rows, mask=queries < query_len, other=0.0)

    acc = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    blocks = blocks_of(first_query, QUERIES, side, KEYS)
    for masked in tl.static_range(2):
        for i in range(block_count(blocks, masked)):
            acc = _dq_block(
                acc, q_tile, grad_tile, row_lse, row_delta,
                head_rows(k, batch, head // group), head_rows(v, batch, head // group), nth_block(i, blocks, masked),
                first_query, side, dropout, batch_head, scale, HEAD_DIM, PRECISION, masked, QUERIES, KEYS, BLOCK_D,
            )  # fmt: skip
    store_tile(head_rows(dq, batch, head), acc * scale, first_query, query_len, HEAD_DIM, QUERIES, BLOCK_D)
    if any_nonfinite(acc):
        sum_nonfinite(
            head_rows(dq, batch, head), head_rows(q, batch, head), head_rows(grad_out, batch, head), k, v, lse, delta,
            batch, head // group, batch_head, 1, first_query, side, dropout, scale, scale, True, False,
            HEAD_DIM, QUERIES, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _dkdv_block(
    state, k, v, q, grad, lse, delta, block, first_key, side, dropout, batch_head, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Accumulate dK / scale and dV over one block of queries. Scores are transposed: (KEYS, QUERIES)."""
    dk, dv = state
    first_query = block * QUERIES
    q_tile = load_tile(q, first_query, other_length(side), HEAD_DIM, MASKED, QUERIES, BLOCK_D)
    grad_tile = load_tile(grad, first_query, other_length(side), HEAD_DIM, MASKED, QUERIES, BLOCK_D)
    queries = first_query + tl.arange(0, QUERIES)
    inside = queries < other_length(side) if MASKED else None
    row_lse, row_delta = tl.load(lse + queries, mask=inside), tl.load(delta + queries, mask=inside)
    scores = dot(k, tl.trans(q_tile), None, PRECISION)
    weights = tl.exp2((scores * scale - row_lse[None, :]) * LOG2E)
    grad_weights = dot(v, tl.trans(grad_tile), None, PRECISION)
    if dropout is not None:
        factor = dropout_mask(dropout, batch_head, first_query, first_key, QUERIES, KEYS, True) * dropout[2]
        grad_weights *= factor
    grad_scores = weights * (grad_weights - row_delta[None, :])
    if dropout is not None:
        weights *= factor
    if MASKED:
        mask = attended(first_key, KEYS, side, first_query, QUERIES)
        weights, grad_scores = tl.where(mask, weights, 0.0), tl.where(mask, grad_scores, 0.0)
    dv = dot(narrow(weights, grad_tile.dtype), grad_tile, dv, PRECISION)
    return dot(narrow(grad_scores, q_tile.dtype), q_tile, dk, PRECISION), dv


@triton.jit(do_not_specialize=CALL)
def _dkdv_kernel(
    grad_out,  # view of the gradient of out (B, H, Tq, D)
    q,  # view of the queries (B, H, Tq, D)
    k,  # view of the keys (B, H / group, Tk, D)
    v,  # view of the values (B, H / group, Tk, D)
    lse,  # *float32 (B, H, Tq): the forward's log of the sum of exponentials
    delta,  # *float32 (B, H, Tq): rowsum(dO * O) - dlse
    dk,  # view of the gradient of k (B, H / group, Tk, D): written
    dv,  # view of the gradient of v (B, H / group, Tk, D): written
    spans,  # *int32 (B, Tk, 2): the range of queries of each key, with documents, or None
    query_len,  # Tq
    kv_len,  # Tk
    window_left,  # keys before its position that a query attends to
    window_right,  # keys after it
    seed,  # of dropout, or None
    dropout_threshold,  # smallest random word with which dropout keeps a weight
    dropout_scale,  # 1 / (1 - dropout_p)
    batch_heads,  # B H
    query_heads,  # H
    group,  # query heads per head of keys
    heads_per_wave,  # heads that are interleaved
    scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, batch, kv_head, first_key = _tile(
        kv_len, batch_heads // group, query_heads // group, heads_per_wave, False, KEYS
    )
    if spans is not None:
        spans += batch.to(tl.int64) * kv_len * 2
    side = spans, kv_len, query_len, window_right, window_left
    dropout = None if seed is None else (seed, dropout_threshold, dropout_scale)
    k_tile = load_tile(head_rows(k, batch, kv_head), first_key, kv_len, HEAD_DIM, True, KEYS, BLOCK_D)
    v_tile = load_tile(head_rows(v, batch, kv_head), first_key, kv_len, HEAD_DIM, True, KEYS, BLOCK_D)

    zeros = tl.zeros((KEYS, BLOCK_D), tl.float32)
    state = zeros, zeros
    blocks = blocks_of(first_key, KEYS, side, QUERIES)
    for i in range(group):  # the query heads that share these keys, in order
        head = kv_head * group + i
        batch_head = batch * query_heads + head
        rows = batch_head.to(tl.int64) * query_len
        q_rows, grad_rows = head_rows(q, batch, head), head_rows(grad_out, batch, head)
        for masked in tl.static_range(2):
            for j in range(block_count(blocks, masked)):
                state = _dkdv_block(
                    state, k_tile, v_tile, q_rows, grad_rows, lse + rows, delta + rows, nth_block(j, blocks, masked),
                    first_key, side, dropout, batch_head, scale,
                    HEAD_DIM, PRECISION, masked, QUERIES, KEYS, BLOCK_D,
                )  # fmt: skip
    dk_tile, dv_tile = state
    store_tile(head_rows(dk, batch, kv_head), dk_tile * scale, first_key, kv_len, HEAD_DIM, KEYS, BLOCK_D)
    store_tile(head_rows(dv, batch, kv_head), dv_tile, first_key, kv_len, HEAD_DIM, KEYS, BLOCK_D)
    if any_nonfinite(dk_tile) | any_nonfinite(dv_tile):
        k_rows, v_rows = head_rows(k, batch, kv_head), head_rows(v, batch, kv_head)
        head = kv_head * group
        for ds in tl.static_range(2):
            sum_nonfinite(
                head_rows(dk if ds else dv, batch, kv_head), k_rows, v_rows, q, grad_out, lse, delta, batch, head,
                batch * query_heads + head, group, first_key, side, dropout, scale, scale if ds else 1.0, ds, True,
                HEAD_DIM, KEYS, BLOCK_D,
            )  # fmt: skip


# ---- launches --------------------------------------------------------------------------------------------------------


# The fields of gptcore.ops.attention.Settings, which has checked them.
Settings = tuple[Tensor | None, Tensor | None, Tensor | None, float, bool, int, int, float]


def _call(q: Tensor, k: Tensor, settings: Settings, keys: bool = False) -> tuple[Any, ...]:
    """Return the arguments from `spans` to `scale` of a kernel whose tiles are of queries or, with `keys`, of keys."""
    cu_seqlens_q, cu_seqlens_k, seed, scale, causal, window_left, window_right, dropout_p = settings
    lengths, window = (q.shape[2], k.shape[2]), limits(causal, window_left, window_right)
    if keys:
        spans = spans_of(cu_seqlens_k, cu_seqlens_q, q.shape[0], lengths[::-1], window[::-1])
    else:
        spans = spans_of(cu_seqlens_q, cu_seqlens_k, q.shape[0], lengths, window)
    dropout = None if seed is None else int(seed), int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)
    return spans, *lengths, *window, *dropout, *head_counts(q, k, keys), scale


def _constants(q: Tensor) -> dict[str, Any]:
    """Return the constants that a kernel is compiled for, besides the tile."""
    # Few AMD GPUs have TF32; it is not used there.
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "PRECISION": "tf32" if tf32 else "ieee",
        # In float32 scale x score must be rounded before lse is subtracted: docs/kernels.md, "Rounding".
        "enable_fp_fusion": q.dtype != torch.float32 or tf32,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, settings: Settings) -> None:
    """Write out and lse."""
    batch, heads, query_len, _ = q.shape
    launch(
        _forward_kernel, tiles("forward", q), ("QUERIES", "KEYS"),
        lambda tile: batch * heads * triton.cdiv(query_len, tile.rows),
        view(q), view(k), view(v), view(out), lse, *_call(q, k, settings), like=q, **_constants(q),
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    settings: Settings,
) -> None:
    """Write dq, dk and dv."""
    if not q.numel():
        dk.zero_()
        dv.zero_()
        return
    batch, heads, query_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    delta = torch.empty_like(lse)
    launch(
        _dq_kernel, tiles("dq", q), ("QUERIES", "KEYS"), lambda tile: batch * heads * triton.cdiv(query_len, tile.rows),
        view(grad_out), grad_lse, view(q), view(k), view(v), view(out), lse, view(dq), delta, *_call(q, k, settings),
        like=q, **_constants(q),
    )  # fmt: skip
    launch(
        _dkdv_kernel, tiles("dkdv", q), ("QUERIES", "KEYS"),
        lambda tile: batch * kv_heads * triton.cdiv(kv_len, tile.columns),
        view(grad_out), view(q), view(k), view(v), lse, delta, view(dk), view(dv), *_call(q, k, settings, keys=True),
        like=q, **_constants(q),
    )  # fmt: skip
