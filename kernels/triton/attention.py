"""Fused softmax-attention in Triton, forward and backward.

"FlashAttention-2" (Dao 2023) in its deterministic form: one kernel owns a tile of queries and makes out or dQ, another
owns a tile of keys and makes dK and dV; nobody adds to memory that somebody else writes.

Every mask here, causal, window or documents, lets a query see one run of consecutive keys, and a later query no earlier
ones: [first, end) with both ends ascending. So the first and the last query of a tile say which blocks of keys to visit
and which of those need no mask. The same holds of the queries that see a key.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import Tile, cache_bytes, launch, view
from gptcore.kernels.numerics import dot, narrow
from gptcore.kernels.tiles import tiles

LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that may differ from call to call: a kernel is not compiled anew for some of their values.
CALL = [
    "query_len", "kv_len", "left", "right", "seed", "least", "restore", "batch_heads", "query_heads", "group",
    "together", "scale",
]  # fmt: skip
NO_LIMIT = 2**30  # tokens on one side of a position: more than there are, and far from overflowing int32


# A view is a tuple: the pointer to (batch, heads, length, head_dim), and the strides of the first three dimensions.


@triton.jit
def _head(view, batch, head):
    """The pointer to one head's rows, and the stride of those. Offsets are int64: a tensor may exceed 2^31 elements."""
    return view[0] + batch.to(tl.int64) * view[1] + head.to(tl.int64) * view[2], view[3]


@triton.jit
def _pointers(rows_of_head, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    return rows_of_head[0] + rows[:, None] * rows_of_head[1] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _mask(first, length, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What of a tile lies inside of the tensor."""
    rows = (first + tl.arange(0, ROWS) < length)[:, None]
    columns = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if HEAD_DIM == BLOCK_D:
        return rows
    elif MASK_ROWS:
        return rows & columns
    else:
        return columns


@triton.jit
def _load(rows_of_head, first, length, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, ROWS: tl.constexpr,
          BLOCK_D: tl.constexpr):  # fmt: skip
    """A tile (ROWS, BLOCK_D), zero outside of the tensor."""
    pointers = _pointers(rows_of_head, first, ROWS, BLOCK_D)
    if MASK_ROWS or HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=_mask(first, length, HEAD_DIM, MASK_ROWS, ROWS, BLOCK_D), other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(rows_of_head, tile, first, length, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = _pointers(rows_of_head, first, ROWS, BLOCK_D)
    mask = _mask(first, length, HEAD_DIM, True, ROWS, BLOCK_D)
    tl.store(pointers, narrow(tile, pointers.dtype.element_ty), mask=mask)


# A side is a tuple too: (spans, length, other length, tokens before, tokens after).
# It says how far its tokens see on the other.


@triton.jit
def _span(tokens, side):
    """The run [first, end) of tokens on the other side that these meet. Aligned at the end: the last meets the last."""
    spans, length, other_length, before, after = side
    if spans is None:
        position = tokens + (other_length - length)
        return tl.maximum(position - before, 0), tl.maximum(tl.minimum(position + after + 1, other_length), 0)
    else:
        inside = tokens < length
        return tl.load(spans + 2 * tokens, mask=inside, other=0), tl.load(spans + 2 * tokens + 1, mask=inside, other=0)


@triton.jit
def _seen(first_token, TOKENS: tl.constexpr, side, first_other, OTHERS: tl.constexpr):
    """Which tokens of the other side these meet: (TOKENS, OTHERS)."""
    first, end = _span(first_token + tl.arange(0, TOKENS), side)
    others = first_other + tl.arange(0, OTHERS)[None, :]
    return (others >= first[:, None]) & (others < end[:, None])


@triton.jit
def _blocks(first_token, TOKENS: tl.constexpr, side, BLOCK: tl.constexpr):
    """Blocks of the other side that a tile visits: [begin, end), and of those [whole, whole_end) without a mask."""
    first, first_end = _span(first_token, side)
    last, last_end = _span(tl.minimum(first_token + TOKENS, side[1]) - 1, side)
    begin, end = first // BLOCK, tl.cdiv(last_end, BLOCK)
    whole = tl.minimum(tl.cdiv(last, BLOCK), end)
    return begin, end, whole, tl.maximum(first_end // BLOCK, whole)


@triton.jit
def _count(blocks, MASKED: tl.constexpr):
    begin, end, whole, whole_end = blocks
    return (end - begin) - (whole_end - whole) if MASKED else whole_end - whole


@triton.jit
def _nth(i, blocks, MASKED: tl.constexpr):
    begin, _end, whole, whole_end = blocks
    return begin + i + tl.where(begin + i < whole, 0, whole_end - whole) if MASKED else whole + i


@triton.jit
def _kept(
    dropout, batch_head, first_query, first_key,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """1 for the weights of a tile that dropout keeps, 0 for the others.

    Philox4x32-10 of the counter (key // 4, query, batch x heads + head, 0), of which key takes word key % 4.
    """
    fours = first_key // 4 + tl.arange(0, KEYS // 4)[None, :]
    queries = first_query + tl.arange(0, QUERIES)[:, None]
    w0, w1, w2, w3 = tl.philox(dropout[0], fours, queries, batch_head, 0)
    least = dropout[1].to(tl.uint32)
    # Numbers, not bits: on their way through shared memory the compiler for AMD stumbles over those.
    even = tl.join((w0 >= least).to(tl.float16), (w2 >= least).to(tl.float16))
    odd = tl.join((w1 >= least).to(tl.float16), (w3 >= least).to(tl.float16))
    kept = tl.reshape(tl.join(even, odd), (QUERIES, KEYS))
    return (tl.trans(kept) if TRANSPOSED else kept).to(tl.float32)


@triton.jit
def _head_and_tile(program, tiles, heads, together):
    """Program `program` of heads x tiles. The heads of a section take turns, tile 0 of all of them first.

    So where tiles come in the order of their work, the longest begin first, and processors run out of it together. A
    section is `together` heads: what all of their programs read stays in the cache.
    """
    first = program // (together * tiles) * together
    in_section, taking_turns = program - first * tiles, tl.minimum(heads - first, together)
    return first + in_section % taking_turns, in_section // taking_turns


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_block(
    state, q, k, v, block, first_query, side, dropout, batch_head, factor,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys: online softmax of the scores (QUERIES, KEYS), in units of 1 / |scale|."""
    acc, total, largest = state
    first_key = block * KEYS
    k_tile = _load(k, first_key, side[2], HEAD_DIM, MASKED, KEYS, BLOCK_D)
    scores = dot(q, tl.trans(k_tile), None, PRECISION)
    if MASKED:
        scores = tl.where(_seen(first_query, QUERIES, side, first_key, KEYS), scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest  # -inf - -inf is NaN
    weights = tl.exp2((scores - base[:, None]) * factor)
    shrink = tl.exp2((largest - base) * factor)
    total = total * shrink + tl.sum(weights, 1)
    if dropout is not None:  # after the sum: softmax is of all keys, and what 1 / (1 - p) restores comes at the end
        weights *= _kept(dropout, batch_head, first_query, first_key, QUERIES, KEYS, False)
    v_tile = _load(v, first_key, side[2], HEAD_DIM, MASKED, KEYS, BLOCK_D)
    acc = dot(narrow(weights, v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
    return acc, total, new_largest


@triton.jit(do_not_specialize=CALL)
def _forward_kernel(
    q,  # view of the queries (B, H, Tq, D)
    k,  # view of the keys (B, H / group, Tk, D)
    v,  # view of the values (B, H / group, Tk, D)
    out,  # view of the output (B, H, Tq, D)
    lse,  # *float32 (B, H, Tq): natural log of the sum of exponentials
    spans,  # *int32 (B, Tq, 2): the keys that each query sees, where documents say so
    query_len,  # Tq
    kv_len,  # Tk
    left,  # keys on the left of its position that a query sees
    right,  # keys on the right of it
    seed,  # of dropout, or None
    least,  # random word with which dropout keeps a weight
    restore,  # what the weights kept are multiplied with
    batch_heads,  # B H
    query_heads,  # H
    group,  # query heads per head of keys
    together,  # heads that take turns
    scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(query_len, QUERIES)
    batch_head, tile = _head_and_tile(tl.program_id(0), tiles, batch_heads, together)
    first_query = (tiles - 1 - tile) * QUERIES  # causal: the longest first
    batch, head = batch_head // query_heads, batch_head % query_heads
    if spans is not None:
        spans += batch.to(tl.int64) * query_len * 2
    side = spans, query_len, kv_len, left, right
    dropout = None if seed is None else (seed, least, restore)
    k, v = _head(k, batch, head // group), _head(v, batch, head // group)

    # Scores are compared before they are scaled, which costs one rounding less: so q takes the sign, and zero too.
    sign = tl.where(scale > 0.0, 1.0, tl.where(scale < 0.0, -1.0, 0.0))
    size = tl.where(scale == 0.0, 1.0, tl.abs(scale))
    q_tile = _load(_head(q, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    q_tile = narrow(q_tile.to(tl.float32) * sign, q_tile.dtype)

    acc = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    state = acc, total, largest
    blocks = _blocks(first_query, QUERIES, side, KEYS)
    for masked in tl.static_range(2):
        for i in range(_count(blocks, masked)):
            state = _forward_block(
                state, q_tile, k, v, _nth(i, blocks, masked), first_query, side, dropout, batch_head, size * LOG2E,
                HEAD_DIM, PRECISION, masked, QUERIES, KEYS, BLOCK_D,
            )  # fmt: skip
    acc, total, largest = state

    queries = first_query + tl.arange(0, QUERIES)
    first, end = _span(queries, side)
    total = tl.where(first < end, total, 1.0)  # for a query that sees no key: zeros, and -inf
    acc = acc / total[:, None]
    if dropout is not None:
        acc *= dropout[2]
    _store(_head(out, batch, head), acc, first_query, query_len, HEAD_DIM, QUERIES, BLOCK_D)
    row_lse = largest * size + tl.log(total)
    tl.store(lse + batch_head.to(tl.int64) * query_len + queries, row_lse, mask=queries < query_len)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _products_of_rows(a, b, PRECISION: tl.constexpr):
    """The scalar product of each row of a with that of b.

    In float32 it is the diagonal of a product of matrices, and rounds what `dot` rounds, in the same order: where one
    key has all the weight, dP - delta is exactly 0. In 16 bits dS is rounded by more than the order could change.
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
    """dQ of one block of keys, still without the factor scale."""
    first_key = block * KEYS
    k_tile = _load(k, first_key, side[2], HEAD_DIM, MASKED, KEYS, BLOCK_D)
    v_tile = _load(v, first_key, side[2], HEAD_DIM, MASKED, KEYS, BLOCK_D)
    scores = dot(q, tl.trans(k_tile), None, PRECISION)
    weights = tl.exp2((scores * scale - row_lse[:, None]) * LOG2E)
    grad_weights = dot(grad, tl.trans(v_tile), None, PRECISION)
    if dropout is not None:
        grad_weights *= _kept(dropout, batch_head, first_query, first_key, QUERIES, KEYS, False) * dropout[2]
    grad_scores = weights * (grad_weights - delta[:, None])
    if MASKED:  # selected, not multiplied: weights of keys that are not seen may be infinite
        grad_scores = tl.where(_seen(first_query, QUERIES, side, first_key, KEYS), grad_scores, 0.0)
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
    spans,  # *int32 (B, Tq, 2): the keys that each query sees, where documents say so
    query_len,  # Tq
    kv_len,  # Tk
    left,  # keys on the left of its position that a query sees
    right,  # keys on the right of it
    seed,  # of dropout, or None
    least,  # random word with which dropout keeps a weight
    restore,  # what the weights kept are multiplied with
    batch_heads,  # B H
    query_heads,  # H
    group,  # query heads per head of keys
    together,  # heads that take turns
    scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(query_len, QUERIES)
    batch_head, tile = _head_and_tile(tl.program_id(0), tiles, batch_heads, together)
    first_query = (tiles - 1 - tile) * QUERIES
    batch, head = batch_head // query_heads, batch_head % query_heads
    if spans is not None:
        spans += batch.to(tl.int64) * query_len * 2
    side = spans, query_len, kv_len, left, right
    dropout = None if seed is None else (seed, least, restore)
    k, v = _head(k, batch, head // group), _head(v, batch, head // group)

    q_tile = _load(_head(q, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    grad_tile = _load(_head(grad_out, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    out_tile = _load(_head(out, batch, head), first_query, query_len, HEAD_DIM, True, QUERIES, BLOCK_D)
    row_delta = _products_of_rows(grad_tile, out_tile, PRECISION)
    queries = first_query + tl.arange(0, QUERIES)
    rows = batch_head.to(tl.int64) * query_len + queries
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + rows, mask=queries < query_len, other=0.0)
    tl.store(delta + rows, row_delta, mask=queries < query_len)
    row_lse = tl.load(lse + rows, mask=queries < query_len, other=0.0)

    total = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    blocks = _blocks(first_query, QUERIES, side, KEYS)
    for masked in tl.static_range(2):
        for i in range(_count(blocks, masked)):
            total = _dq_block(
                total, q_tile, grad_tile, row_lse, row_delta, k, v, _nth(i, blocks, masked), first_query, side,
                dropout, batch_head, scale, HEAD_DIM, PRECISION, masked, QUERIES, KEYS, BLOCK_D,
            )  # fmt: skip
    _store(_head(dq, batch, head), total * scale, first_query, query_len, HEAD_DIM, QUERIES, BLOCK_D)


@triton.jit
def _dkdv_block(
    state, k, v, q, grad, lse, delta, block, first_key, side, dropout, batch_head, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK, still without the factor scale, and dV of one block of queries. Scores are transposed: (KEYS, QUERIES)."""
    dk, dv = state
    first_query = block * QUERIES
    q_tile = _load(q, first_query, side[2], HEAD_DIM, MASKED, QUERIES, BLOCK_D)
    grad_tile = _load(grad, first_query, side[2], HEAD_DIM, MASKED, QUERIES, BLOCK_D)
    queries = first_query + tl.arange(0, QUERIES)
    inside = queries < side[2] if MASKED else None
    row_lse, row_delta = tl.load(lse + queries, mask=inside), tl.load(delta + queries, mask=inside)
    scores = dot(k, tl.trans(q_tile), None, PRECISION)
    weights = tl.exp2((scores * scale - row_lse[None, :]) * LOG2E)
    grad_weights = dot(v, tl.trans(grad_tile), None, PRECISION)
    if dropout is not None:
        factor = _kept(dropout, batch_head, first_query, first_key, QUERIES, KEYS, True) * dropout[2]
        grad_weights *= factor
    grad_scores = weights * (grad_weights - row_delta[None, :])
    if dropout is not None:
        weights *= factor
    if MASKED:
        seen = _seen(first_key, KEYS, side, first_query, QUERIES)
        weights, grad_scores = tl.where(seen, weights, 0.0), tl.where(seen, grad_scores, 0.0)
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
    spans,  # *int32 (B, Tk, 2): the queries that see each key, where documents say so
    query_len,  # Tq
    kv_len,  # Tk
    left,  # keys on the left of its position that a query sees
    right,  # keys on the right of it
    seed,  # of dropout, or None
    least,  # random word with which dropout keeps a weight
    restore,  # what the weights kept are multiplied with
    batch_heads,  # B H
    query_heads,  # H
    group,  # query heads per head of keys
    together,  # heads that take turns
    scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch_head, tile = _head_and_tile(tl.program_id(0), tl.cdiv(kv_len, KEYS), batch_heads // group, together)
    batch, kv_head = batch_head // (query_heads // group), batch_head % (query_heads // group)
    first_key = tile * KEYS  # causal: the first keys are seen by most
    if spans is not None:
        spans += batch.to(tl.int64) * kv_len * 2
    side = spans, kv_len, query_len, right, left
    dropout = None if seed is None else (seed, least, restore)
    k_tile = _load(_head(k, batch, kv_head), first_key, kv_len, HEAD_DIM, True, KEYS, BLOCK_D)
    v_tile = _load(_head(v, batch, kv_head), first_key, kv_len, HEAD_DIM, True, KEYS, BLOCK_D)

    state = tl.zeros((KEYS, BLOCK_D), tl.float32), tl.zeros((KEYS, BLOCK_D), tl.float32)
    blocks = _blocks(first_key, KEYS, side, QUERIES)
    for i in range(group):  # the heads that share these keys, in this order
        head = kv_head * group + i
        batch_head = batch * query_heads + head
        rows = batch_head.to(tl.int64) * query_len
        q_rows, grad_rows = _head(q, batch, head), _head(grad_out, batch, head)
        for masked in tl.static_range(2):
            for j in range(_count(blocks, masked)):
                state = _dkdv_block(
                    state, k_tile, v_tile, q_rows, grad_rows, lse + rows, delta + rows, _nth(j, blocks, masked),
                    first_key, side, dropout, batch_head, scale,
                    HEAD_DIM, PRECISION, masked, QUERIES, KEYS, BLOCK_D,
                )  # fmt: skip
    dk_tile, dv_tile = state
    _store(_head(dk, batch, kv_head), dk_tile * scale, first_key, kv_len, HEAD_DIM, KEYS, BLOCK_D)
    _store(_head(dv, batch, kv_head), dv_tile, first_key, kv_len, HEAD_DIM, KEYS, BLOCK_D)


# ---- documents -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["boundaries", "steps", "length", "other_length", "before", "after"])
def _spans_kernel(
    spans,  # *int32 (B, length, 2): written, what _span says of each token
    cu,  # *int (boundaries,): the boundaries of the documents on this side, over the batch or for each row alike
    other_cu,  # *int (boundaries,): those on the other side
    boundaries,
    steps,  # of a binary search among them
    length,
    other_length,
    before,
    after,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    offset = tl.where(tl.load(cu + boundaries - 1) == length, 0, row * length)
    other_offset = tl.where(tl.load(other_cu + boundaries - 1) == other_length, 0, row * other_length)
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + (boundaries - 2)
    for _ in range(steps):  # the first document that ends behind the token
        middle = (low + high) // 2
        behind = tl.load(cu + middle + 1) > tokens + offset
        low, high = tl.where(behind, low, tl.minimum(middle + 1, high)), tl.where(behind, middle, high)
    other_begin, other_end = tl.load(other_cu + low) - other_offset, tl.load(other_cu + low + 1) - other_offset
    position = tokens + offset - tl.load(cu + low + 1) + other_end
    first = tl.maximum(position - before, other_begin)
    end = tl.maximum(tl.minimum(position + after + 1, other_end), other_begin)  # ascending, even where nothing is seen
    to = spans + (row * length + tokens) * 2
    tl.store(to, first.to(tl.int32), mask=tokens < length)
    tl.store(to + 1, end.to(tl.int32), mask=tokens < length)


def _spans(
    cu: Tensor | None, other_cu: Tensor | None, batch: int, lengths: tuple[int, int], limits: tuple[int, int]
) -> Tensor | None:
    """The runs that _span would say, int32 (batch, length, 2), where documents say them."""
    if cu is None or other_cu is None:
        return None
    cu, other_cu = cu.contiguous(), other_cu.contiguous()
    spans = cu.new_empty(batch, lengths[0], 2, dtype=torch.int32)
    launch(
        _spans_kernel, [Tile(256, 1, 4, 1)], ("BLOCK",), lambda tile: batch * triton.cdiv(lengths[0], tile.rows),
        spans, cu, other_cu, cu.numel(), cu.numel().bit_length(), *lengths, *limits, like=cu,
    )  # fmt: skip
    return spans


# ---- what is called --------------------------------------------------------------------------------------------------


def _limits(causal: bool, left: int, right: int) -> tuple[int, int]:
    left, right = (NO_LIMIT if limit < 0 else min(limit, NO_LIMIT) for limit in (left, right))
    return left, 0 if causal else right


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[int | None, int, float]:
    return None if seed is None else int(seed), int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p)


def _heads(q: Tensor, k: Tensor, keys: bool = False) -> tuple[int, int, int, int]:
    """All query heads, those of a row of the batch, those to a head of keys; and how many heads take turns.

    `keys`: heads of keys, with the queries and gradients that pass by; otherwise of queries, with keys and values. As
    many as have these in a quarter of the cache, in sections of one size (kernels/cuda/policy.h).
    """
    batch, query_heads, query_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = query_heads // kv_heads
    heads = batch * (kv_heads if keys else query_heads)
    head_bytes = 2 * head_dim * q.element_size() * (query_len * group if keys else kv_len // max(1, group))
    fit = max(1, cache_bytes(q.device) // 4 // max(1, head_bytes))
    together = triton.cdiv(heads, max(1, triton.cdiv(heads, fit)))
    return batch * query_heads, query_heads, group, max(1, together)


def _constants(q: Tensor) -> dict[str, Any]:
    """What a kernel is compiled for, beside the tile."""
    # Of AMD's GPUs few have TF32, and where it is allowed, it is not asked for.
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "PRECISION": "tf32" if tf32 else "ieee",
        # Fused, scale x score - lse would take the rounded log-sum-exp from an exact product: where scores are in the
        # thousands, the weight of the only key would be far from 1. In 16 bits that is less than a rounding of it.
        "enable_fp_fusion": q.dtype != torch.float32 or tf32,
    }


# The fields of gptcore.ops.attention.Settings, where they are checked.
Settings = tuple[Tensor | None, Tensor | None, Tensor | None, float, bool, int, int, float]


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, settings: Settings) -> None:
    """Write out and lse."""
    cu_q, cu_k, seed, scale, causal, left, right, dropout_p = settings
    batch, heads, query_len, _ = q.shape
    lengths, limits = (query_len, k.shape[2]), _limits(causal, left, right)
    launch(
        _forward_kernel, tiles("forward", q), ("QUERIES", "KEYS"),
        lambda tile: batch * heads * triton.cdiv(query_len, tile.rows),
        view(q), view(k), view(v), view(out), lse, _spans(cu_q, cu_k, batch, lengths, limits), *lengths, *limits,
        *_dropout(seed, dropout_p), *_heads(q, k), scale, like=q, **_constants(q),
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
    cu_q, cu_k, seed, scale, causal, left, right, dropout_p = settings
    batch, heads, query_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if heads == 0:  # the kernels divide by the query heads of a key head
        dk.zero_(), dv.zero_()
        return
    delta = torch.empty_like(lse)
    lengths, limits, dropout = (query_len, kv_len), _limits(causal, left, right), _dropout(seed, dropout_p)
    bounds = (*lengths, *limits, *dropout)
    launch(
        _dq_kernel, tiles("dq", q), ("QUERIES", "KEYS"), lambda tile: batch * heads * triton.cdiv(query_len, tile.rows),
        view(grad_out), grad_lse, view(q), view(k), view(v), view(out), lse, view(dq), delta,
        _spans(cu_q, cu_k, batch, lengths, limits), *bounds, *_heads(q, k), scale, like=q, **_constants(q),
    )  # fmt: skip
    launch(
        _dkdv_kernel, tiles("dkdv", q), ("QUERIES", "KEYS"),
        lambda tile: batch * kv_heads * triton.cdiv(kv_len, tile.columns),
        view(grad_out), view(q), view(k), view(v), lse, delta, view(dk), view(dv),
        _spans(cu_k, cu_q, batch, lengths[::-1], limits[::-1]), *bounds, *_heads(q, k, keys=True), scale,
        like=q, **_constants(q),
    )  # fmt: skip
