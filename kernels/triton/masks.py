"""The masks of attention: causal, windows, documents, dropout.

Under every mask a query attends to one range of keys, [first, end), and both ends never decrease from query to query.
The first and the last query of a tile therefore determine the blocks of keys to visit, and which of them need no mask.
The same holds for the queries that attend to a key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import Tile, launch

NO_LIMIT = 2**30  # tokens on one side of a position: more than any length, without overflow of int32

# A side (of queries, or of keys) is a tuple: (spans, length, other length, window_left, window_right). It defines the
# range of tokens on the other side that each of its tokens attends to (or, for keys, is attended by).


@triton.jit
def other_length(side):
    """Return the number of tokens on the other side."""
    _spans, _length, other, _window_left, _window_right = side
    return other


@triton.jit
def span(tokens, side):
    """Return the range [first, end) on the other side of each token. The last tokens of both have one position."""
    spans, length, other, window_left, window_right = side
    if spans is None:
        position = tokens + (other - length)
        return tl.maximum(position - window_left, 0), tl.maximum(tl.minimum(position + window_right + 1, other), 0)
    else:
        inside = tokens < length
        return tl.load(spans + 2 * tokens, mask=inside, other=0), tl.load(spans + 2 * tokens + 1, mask=inside, other=0)


@triton.jit
def attended(first_token, TOKENS: tl.constexpr, side, first_other, OTHERS: tl.constexpr):
    """Return the mask (TOKENS, OTHERS): True for pairs of which one attends to the other."""
    first, end = span(first_token + tl.arange(0, TOKENS), side)
    others = first_other + tl.arange(0, OTHERS)[None, :]
    return (others >= first[:, None]) & (others < end[:, None])


@triton.jit
def blocks_of(first_token, TOKENS: tl.constexpr, side, BLOCK: tl.constexpr):
    """Return the blocks of the other side of a tile: all are [begin, end), those without a mask [whole, whole_end)."""
    first, first_end = span(first_token, side)
    _spans, length, _other, _window_left, _window_right = side
    last, last_end = span(tl.minimum(first_token + TOKENS, length) - 1, side)
    begin, end = first // BLOCK, tl.cdiv(last_end, BLOCK)
    whole = tl.minimum(tl.cdiv(last, BLOCK), end)
    return begin, end, whole, tl.maximum(first_end // BLOCK, whole)


@triton.jit
def block_count(blocks, MASKED: tl.constexpr):
    begin, end, whole, whole_end = blocks
    return (end - begin) - (whole_end - whole) if MASKED else whole_end - whole


@triton.jit
def nth_block(i, blocks, MASKED: tl.constexpr):
    begin, _end, whole, whole_end = blocks
    return begin + i + tl.where(begin + i < whole, 0, whole_end - whole) if MASKED else whole + i


@triton.jit
def dropout_mask(
    dropout, batch_head, first_query, first_key,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return 1 for the weights of a tile that dropout keeps, 0 for the others.

    Word key % 4 of Philox4x32-10 with the counter (key // 4, query, batch x heads + head, 0) decides.
    """
    fours = first_key // 4 + tl.arange(0, KEYS // 4)[None, :]
    queries = first_query + tl.arange(0, QUERIES)[:, None]
    seed, dropout_threshold, _scale = dropout
    w0, w1, w2, w3 = tl.philox(seed, fours, queries, batch_head, 0)
    dropout_threshold = dropout_threshold.to(tl.uint32)
    # float16 instead of bits, which the AMD compiler cannot move through shared memory.
    even = tl.join((w0 >= dropout_threshold).to(tl.float16), (w2 >= dropout_threshold).to(tl.float16))
    odd = tl.join((w1 >= dropout_threshold).to(tl.float16), (w3 >= dropout_threshold).to(tl.float16))
    kept = tl.reshape(tl.join(even, odd), (QUERIES, KEYS))
    return (tl.trans(kept) if TRANSPOSED else kept).to(tl.float32)


@triton.jit
def is_kept(dropout, batch_head, queries, keys):
    """Return whether dropout keeps the weights of these queries and keys, as in `dropout_mask`."""
    seed, dropout_threshold, _scale = dropout
    w0, w1, w2, w3 = tl.philox(seed, keys // 4, queries, batch_head, 0)
    even, odd = tl.where(keys % 4 == 0, w0, w2), tl.where(keys % 4 == 1, w1, w3)
    return tl.where(keys % 2 == 0, even, odd) >= dropout_threshold.to(tl.uint32)


# ---- documents -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["boundaries", "steps", "length", "other_length", "window_left", "window_right"])
def _spans_kernel(
    spans,  # *int32 (B, length, 2): written, the range of each token, as in `span`
    cu,  # *int (boundaries,): cu_seqlens of this side, over the batch or, the same for every row, over one row
    other_cu,  # *int (boundaries,): cu_seqlens of the other side
    boundaries,
    steps,  # of a binary search among them
    length,
    other_length,
    window_left,
    window_right,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    offset = tl.where(tl.load(cu + boundaries - 1) == length, 0, row * length)
    other_offset = tl.where(tl.load(other_cu + boundaries - 1) == other_length, 0, row * other_length)
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + (boundaries - 2)
    for _ in range(steps):  # the first document that ends after the token
        middle = (low + high) // 2
        after = tl.load(cu + middle + 1) > tokens + offset
        low, high = tl.where(after, low, tl.minimum(middle + 1, high)), tl.where(after, middle, high)
    other_begin, other_end = tl.load(other_cu + low) - other_offset, tl.load(other_cu + low + 1) - other_offset
    position = tokens + offset - tl.load(cu + low + 1) + other_end
    first = tl.maximum(position - window_left, other_begin)
    end = tl.maximum(tl.minimum(position + window_right + 1, other_end), other_begin)  # ascending
    to = spans + (row * length + tokens) * 2
    tl.store(to, first.to(tl.int32), mask=tokens < length)
    tl.store(to + 1, end.to(tl.int32), mask=tokens < length)


def spans_of(
    cu: Tensor | None, other_cu: Tensor | None, batch: int, lengths: tuple[int, int], window: tuple[int, int]
) -> Tensor | None:
    """Return the ranges of `span`, int32 (batch, length, 2), or None without documents."""
    if cu is None or other_cu is None:
        return None
    cu, other_cu = cu.contiguous(), other_cu.contiguous()
    spans = cu.new_empty(batch, lengths[0], 2, dtype=torch.int32)
    launch(
        _spans_kernel, [Tile(256, 1, 4, 1)], ("BLOCK",), lambda tile: batch * triton.cdiv(lengths[0], tile.rows),
        spans, cu, other_cu, cu.numel(), cu.numel().bit_length(), *lengths, *window, like=cu,
    )  # fmt: skip
    return spans


def limits(causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """Return window_left and window_right of queries, NO_LIMIT for unlimited."""
    left, right = (NO_LIMIT if limit < 0 else min(limit, NO_LIMIT) for limit in (window_left, window_right))
    return left, 0 if causal else right
