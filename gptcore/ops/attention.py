"""Fused softmax-attention: softmax(scale Q K^T + mask) V, never holding the score matrix.

"Attention Is All You Need" (Vaswani et al. 2017, section 3.2.1), computed as in FlashAttention (Dao et al. 2022).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from gptcore import _C
from gptcore.ops import native, registry

Boundaries = Tensor | tuple[Tensor, Tensor]


class Settings(NamedTuple):
    """The arguments of attention that are not q, k and v, as the kernels take them."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None  # int64, one element on the CPU: torch.compile must not keep one draw for all calls
    scale: float = 1.0
    causal: bool = True
    window_left: int = -1  # -1: no limit
    window_right: int = -1
    dropout_p: float = 0.0


NO_LIMIT = 2**31 - 1  # keys on one side of a query: more than there can be, and far from overflowing int64


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: tuple[int, int] | None = ...,
    cu_seqlens: Boundaries | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: tuple[int, int] | None = ...,
    cu_seqlens: Boundaries | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: Boundaries | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys that it may see.

    Args:
        q: queries, (batch, query_heads, query_len, head_dim); head_dim at most 256. Any strides with a dense last
            dimension: slices of one fused projection need no copy.
        k, v: keys and values, (batch, kv_heads, kv_len, head_dim). query_heads is a multiple of kv_heads: query head h
            uses key-value head h // (query_heads / kv_heads), as in grouped-query attention.
        causal: a query sees no key after its own position. Positions are aligned at the end: the last query stands at
            the last key, whatever the two lengths.
        scale: factor of the scores; None is 1/sqrt(head_dim).
        window: (left, right), how many keys on either side of its position a query sees; -1 is no limit.
        cu_seqlens: documents that must not see each other: int32 or int64 boundaries over all tokens of the batch, row
            after row, from 0 to batch x length, every row's end among them. A last value of `length` alone means the
            same boundaries in every row. Or a pair, for queries and for keys: segment i of the queries sees segment i
            of the keys. Positions are aligned at the end of each segment.
        dropout_p: probability with which a softmax weight is dropped; the others are scaled by 1 / (1 - dropout_p).
            Which are dropped is drawn from PyTorch's default generator and is the same for every backend.
        return_lse: also return the log-sum-exp of each query's scores.
        deterministic: the same input gives the same bits. Every backend here is deterministic with or without it.
        backend: None chooses one; see `gptcore.ops.backends`.

    Returns:
        (batch, query_heads, query_len, head_dim), laid out so that `.transpose(1, 2).flatten(2)` is free; and, with
        return_lse, float32 (batch, query_heads, query_len). A query that sees no key gets zeros and -inf.

    Raises:
        ValueError: shapes, dtypes, strides or arguments that do not fit, with what was expected.
        TypeError: an argument that must be a tensor, a number or a bool is none.
        RuntimeError: the backend that was asked for cannot serve the call.
    """
    native.check_tensors(q=q, k=k, v=v)
    native.check_flags(return_lse=return_lse, deterministic=deterministic)
    q, k, v = native.cast_for_autocast(q, k, v)
    out, lse = _run(q, k, v, None, causal, scale, window, cu_seqlens, dropout_p, backend)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: Boundaries | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`attention` of the q, k and v that one projection has made, whose gradient is one tensor, too.

    The same numbers as of qkv.permute(2, 0, 3, 1, 4).unbind(0), but for that its gradient would be put together from
    three.

    Args:
        qkv: (batch, length, 3, heads, head_dim).
        causal, scale, window, cu_seqlens, dropout_p, backend: as in `attention`.

    Returns:
        (batch, length, heads, head_dim), dense: `.flatten(2)` is free.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention` does.
    """
    native.check_tensors(qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected (batch, length, 3, heads, head_dim)")
    if not qkv.dtype.is_floating_point or qkv.shape[3] < 1:
        raise ValueError(f"qkv is {qkv.dtype} with {qkv.shape[3]} heads, expected a floating-point dtype and 1 or more")
    if qkv.stride(4) != 1 and qkv.shape[4] > 1 and qkv.numel():
        raise ValueError(f"qkv has stride {qkv.stride(4)} in its last dimension, expected 1; call .contiguous() on it")
    (qkv,) = native.cast_for_autocast(qkv)
    out, _ = _run(*_parts(qkv.detach()), qkv, causal, scale, window, cu_seqlens, dropout_p, backend)
    return out.transpose(1, 2)


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, heads, length, head_dim) in (batch, length, 3, heads, head_dim)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Tensor | None,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    cu_seqlens: Boundaries | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments of `attention`; out and the log-sum-exp.

    `packed` is what q, k and v are parts of, if so. Then implementations get it and twice None in place of q, k and v.
    """
    native.check_numbers(scale=0 if scale is None else scale, dropout_p=dropout_p)
    native.check_flags(causal=causal)
    # The native check takes a tenth of the time, and what it does not take, is explained or found to be right here.
    if torch.compiler.is_compiling() or not _C.attention_takes(q, k, v):
        _check(q, k, v)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    elif not abs(scale) <= 1e38:  # log2(e) times it is finite in float32
        raise ValueError(f"scale is {scale}, expected a finite number of at most 1e38")
    left, right = _check_window(window)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    cu_q, cu_k = _check_boundaries(cu_seqlens, q, k)
    run = registry.select("attention", backend, q)
    # The seed is a tensor, so that torch.compile does not take one draw for all.
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu") if dropout_p > 0.0 else None
    tensors = (q, k, v) if packed is None else (packed, None, None)
    out: Tensor
    lse: Tensor
    out, lse = run(*tensors, cu_q, cu_k, seed, float(scale), causal, left, right, float(dropout_p))
    return out, lse


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (batch, heads, length, head_dim)")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, expected {q.dtype} on {q.device} like q")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1 and tensor.numel():
            raise ValueError(
                f"{name} has stride {tensor.stride(3)} in its last dimension, expected 1; call .contiguous() on it"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}, expected a floating-point dtype")
    batch, query_heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}, expected the same")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, expected ({batch}, kv_heads, kv_len, {head_dim}) for q of {tuple(q.shape)}"
        )
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim is {head_dim}, expected 1 to 256")
    if kv_heads < 1 or query_heads % kv_heads:
        raise ValueError(f"q has {query_heads} heads, expected a multiple of the {kv_heads} heads of k and v")


def _check_window(window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2 or any(type(side) is not int for side in window):
        raise ValueError(f"window is {window!r}, expected (left, right), two integers")
    left, right = window
    if left < -1 or right < -1:
        raise ValueError(f"window is {window!r}, expected numbers of keys, or -1 for no limit")
    return min(left, NO_LIMIT), min(right, NO_LIMIT)


def _check_boundaries(cu_seqlens: Boundaries | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The boundaries of queries and of keys. Their values are checked where they are read."""
    if cu_seqlens is None:
        return None, None
    if isinstance(cu_seqlens, Tensor):
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"cu_seqlens for {q.shape[2]} queries and {k.shape[2]} keys a row must be a pair, "
                "(cu_seqlens_q, cu_seqlens_k)"
            )
        cu_seqlens = (cu_seqlens, cu_seqlens)
    if len(cu_seqlens) != 2 or not all(isinstance(cu, Tensor) for cu in cu_seqlens):
        raise ValueError("cu_seqlens must be a tensor of boundaries, or a pair of them for queries and keys")
    for cu in cu_seqlens:
        if cu.dim() != 1 or cu.dtype not in (torch.int32, torch.int64) or cu.device != q.device:
            raise ValueError(
                f"cu_seqlens is {cu.dtype} of shape {tuple(cu.shape)} on {cu.device}, "
                f"expected int32 or int64, 1-D, on {q.device}"
            )
    return cu_seqlens


def _check_values(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor) -> None:
    """Raises ValueError on invalid cu_seqlens; synchronises. Without memory there are no values to check."""
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if cu_q.is_meta or native.is_watched(cu_q, cu_k):
        return
    if registry.is_transformed():  # torch.func's wrappers have no memory to read
        cu_q, cu_k = (torch.from_numpy(np.array(cu.tolist(), np.int64)) for cu in (cu_q, cu_k))
    with torch._C._DisableFuncTorch():
        _C.segments(cu_q.cpu(), cu_k.cpu(), q.shape[0], q.shape[2], k.shape[2])


# ---- torch: the formula in plain PyTorch -----------------------------------------------------------------------------


def _segments(cu: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Of each token, (batch, length): the index of its segment, and its position in it."""
    position = torch.arange(length, device=cu.device).expand(batch, length)
    row_begin = torch.arange(batch, device=cu.device)[:, None] * length
    flat = torch.where(cu[-1] == length, position, position + row_begin)  # one row's boundaries serve every row
    segment = torch.bucketize(flat, cu[1:].contiguous(), right=True)
    return segment, flat - cu[segment]


def _mask(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, left: int, right: int
) -> Tensor:
    """Which keys each query sees: bool, (batch or 1, 1, query_len, kv_len)."""
    batch, _, query_len, _ = q.shape
    kv_len = k.shape[2]
    key = torch.arange(kv_len, device=q.device)[None, None, :]
    position = torch.arange(query_len, device=q.device)[None, :, None] + kv_len - query_len
    seen = torch.ones(1, query_len, kv_len, dtype=torch.bool, device=q.device)
    if cu_q is not None and cu_k is not None:
        _check_values(cu_q, cu_k, q, k)
        query_segment, query_position = _segments(cu_q, batch, query_len)
        key_segment, key_position = _segments(cu_k, batch, kv_len)
        key = key_position[:, None, :]
        position = (query_position + (cu_k.diff() - cu_q.diff())[query_segment])[:, :, None]
        seen = query_segment[:, :, None] == key_segment[:, None, :]
    if causal:
        seen = seen & (key <= position)
    if left >= 0:
        seen = seen & (key >= position - left)
    if right >= 0:
        seen = seen & (key <= position + right)
    return seen[:, None]


def _dropout_keep(shape: torch.Size, seed: Tensor, dropout_p: float, device: torch.device) -> Tensor:
    """Which softmax weights stay: Philox4x32-10 (Salmon et al. 2011) of (seed, batch x heads + head, query, key).

    Word key % 4 of the counter (key // 4, query, batch x heads + head, 0); kept where it is at least dropout_p x 2^32.
    """
    batch, heads, query_len, kv_len = shape
    low = 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # the high and the low 32 bits of a product
        b_high, b_low = b >> 16, b & 0xFFFF  # in halves: int64 has no room for a full 64-bit product
        middle = a * b_high + (a * b_low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (a * b_low & 0xFFFF)

    grid = torch.meshgrid(
        *(torch.arange(n, device=device) for n in (batch * heads, query_len, (kv_len + 3) // 4)), indexing="ij"
    )
    c2, c1, c0 = grid
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(2)[..., :kv_len]
    return (words >= int(dropout_p * 2**32)).view(batch, heads, query_len, kv_len)


def _attention_torch(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    if k is None or v is None:
        q, k, v = _parts(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (tensor.to(wide).repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = scale * (q.to(wide) @ keys.transpose(-2, -1))  # (B, H, Tq, Tk)
    seen = _mask(q, k, cu_q, cu_k, causal, left, right)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    blind = ~seen.any(dim=-1, keepdim=True)  # sees no key: zeros, where softmax would give NaN
    probs = scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
    if seed is not None:
        keep = _dropout_keep(scores.shape, seed.to(q.device), dropout_p, q.device)
        probs = probs * keep / (1.0 - dropout_p)
    out = probs @ values
    return out.transpose(1, 2).contiguous().transpose(1, 2).to(q.dtype), lse.to(torch.float32)


# ---- the kernels -------------------------------------------------------------------------------------------------

_SETTINGS = "Tensor? cu_q, Tensor? cu_k, Tensor? seed, float scale, bool causal, int left, int right, float dropout_p, "


def _like_heads(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape whose heads lie side by side in memory: merging them is a view."""
    _, heads, length, head_dim = shape = tensor.shape
    return tensor.new_empty_strided(shape, (length * heads * head_dim, head_dim, heads * head_dim, 1))


def _outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of q, k and v: the tensor that they are parts of, empty if not `packed`, and they."""
    if not packed:
        return q.new_empty(0), (_like_heads(q), _like_heads(k), _like_heads(v))
    batch, heads, length, head_dim = q.shape
    whole = q.new_empty(batch, length, 3, heads, head_dim)
    return whole, _parts(whole)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    whole, parts = _gradients(q, k, v, rest[-2])
    return (whole, whole.new_empty(0), whole.new_empty(0)) if rest[-2] else parts


def _forward_body(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = native.kernels(backend, "attention")
    if cu_q is not None and cu_k is not None and backend != "cpu":
        _check_values(cu_q, cu_k, q, k)
        cu_q, cu_k = cu_q.long().contiguous(), cu_k.long().contiguous()
    if backend == "triton":
        result: tuple[Tensor, Tensor] = kernels.forward(
            q, k, v, cu_q, cu_k, seed, scale, causal, left, right, dropout_p
        )
        return result
    out, lse = _outputs(q)
    settings = Settings(cu_q, cu_k, seed, scale, causal, left, right, dropout_p)
    kernels.attention_forward(q, k, v, out, lse, settings, native.execution(backend, q))
    return out, lse


def _backward_body(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    dropout_p: float,
    packed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native.kernels(backend, "attention")
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    if cu_q is not None and cu_k is not None and backend != "cpu":
        cu_q, cu_k = cu_q.long().contiguous(), cu_k.long().contiguous()
    whole, gradients = _gradients(q, k, v, packed)
    if backend == "triton":
        kernels.backward(
            grad_out, grad_lse, q, k, v, out, lse, *gradients, cu_q, cu_k, seed, scale, causal, left, right, dropout_p
        )
    else:
        if cu_k is not None:  # keys of a segment without queries are nobody's to write
            gradients[1].zero_()
            gradients[2].zero_()
        settings = Settings(cu_q, cu_k, seed, scale, causal, left, right, dropout_p)
        kernels.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *gradients, settings, native.execution(backend, q)
        )
    return (whole, whole.new_empty(0), whole.new_empty(0)) if packed else gradients


_forward = native.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_SETTINGS}str backend) -> (Tensor, Tensor)",
    _forward_body,
    _outputs,
)
# If packed, the first result is the whole gradient, and the other two are empty.
_backward = native.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}bool packed, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    """q, k and v, or what they are parts of and twice None."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, v: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        tensors = (q, k, v) if k is not None and v is not None else _parts(q)
        out, lse = _forward(*tensors, *settings)
        cu_q, cu_k, seed, *ctx.settings = settings
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, seed)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_lse is not None:
            grad_lse = grad_lse.contiguous()
        packed = k is None
        if packed:
            q, k, v = _parts(q)
        *settings, backend = ctx.settings
        gradients = _backward(grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, seed, *settings, packed, backend)
        return *((gradients[0], None, None) if packed else gradients), *(None,) * 9


registry.BACKENDS["torch"].implementations["attention"] = _attention_torch
native.implement("attention", _Attention)
