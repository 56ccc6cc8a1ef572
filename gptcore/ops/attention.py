"""Fused softmax-attention: softmax(scale Q K^T + mask) V, without materialising the score matrix.

"Attention Is All You Need" (Vaswani et al. 2017, section 3.2.1), computed as in FlashAttention (Dao et al. 2022).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C
from gptcore.ops import arguments, native, registry
from gptcore.ops.documents import Boundaries, check_boundaries, check_values, segments
from gptcore.ops.dropout import dropout_keep
from gptcore.ops.operation import Operation, Sample

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The keyword arguments of `attention`."""

    causal: bool
    scale: float | None
    window: tuple[int, int] | None
    cu_seqlens: Boundaries | None
    dropout_p: float
    backend: str | None


class Settings(NamedTuple):
    """The arguments of attention that are not q, k and v, as the kernels take them."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None  # int64, (1,) on the CPU; a tensor, because torch.compile makes numbers constants
    scale: float = 1.0
    causal: bool = True
    window_left: int = -1  # -1: no limit
    window_right: int = -1
    dropout_p: float = 0.0


NO_LIMIT = 2**31 - 1  # more keys than a tensor can have, and far from overflowing int64


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
    backend: str | None = None,
) -> Tensor:
    """Return softmax(scale q k^T + mask) v: every query attends to the keys that the mask allows.

    Args:
        q: queries, (batch, query_heads, query_len, head_dim); head_dim is at most 256. The last dimension has stride 1;
            other strides are arbitrary, so slices of one fused projection need no copy.
        k, v: keys and values, (batch, kv_heads, kv_len, head_dim). query_heads is a multiple of kv_heads: query head h
            uses KV head h // (query_heads / kv_heads), as in grouped-query attention.
        causal: queries attend to no key after their own position. Positions are aligned at the end: the last query has
            the position of the last key, even if the two lengths differ.
        scale: factor of the scores; None is 1/sqrt(head_dim).
        window: (left, right), the number of keys before and after its position that a query attends to; -1: no limit.
        cu_seqlens: boundaries of packed sequences (documents), which do not attend to each other. int32 or int64, they
            count the tokens of all rows of the batch, from 0 to batch x length, and include the end of every row. If
            the last boundary is `length`, the same boundaries hold in every row. In a pair (cu_seqlens_q,
            cu_seqlens_k), document i of the queries attends to document i of the keys. Positions are aligned at the end
            of each document.
        dropout_p: probability that a softmax weight is dropped; the others are scaled by 1 / (1 - dropout_p). PyTorch's
            default generator draws the seed; every backend drops the same weights. Not while a CUDA graph is recorded.
        backend: None selects the first of `gptcore.ops.backends` that supports the call. A kernel gives the same bits
            in every run.

    Returns:
        (batch, query_heads, query_len, head_dim), laid out so that `.transpose(1, 2).flatten(2)` is a view. A query
        that attends to no key gets zeros. A value that is NaN or infinite makes exactly the outputs of the queries
        that attend to it NaN or infinite (docs/kernels.md). The backward pass of a kernel reads the output, as that of
        F.scaled_dot_product_attention does: it raises after an in-place change.

    Raises:
        ValueError: shapes, dtypes, strides or arguments that do not fit, with what was expected.
        TypeError: an argument has the wrong type.
        RuntimeError: the requested backend cannot run the call.
    """
    return _attend(q, k, v, None, causal, scale, window, cu_seqlens, dropout_p, backend)[0]


_DEFAULTS: dict[str, Any] = attention.__kwdefaults__ or {}


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> tuple[Tensor, Tensor]:
    """Return `attention` and the log-sum-exp of each query's scores: float32 (batch, query_heads, query_len).

    The log-sum-exp of a query that attends to no key is -inf. Arguments and errors are those of `attention`.
    """
    return _attend(q, k, v, None, **{**_DEFAULTS, **options})


def attention_qkvpacked(qkv: Tensor, **options: Unpack[Options]) -> Tensor:
    """Return `attention` of q, k and v packed in one tensor; their gradient is one tensor as well.

    The result equals that of qkv.permute(2, 0, 3, 1, 4).unbind(0), whose gradient would be assembled from three.

    Args:
        qkv: (batch, length, 3, heads, head_dim).
        options: the keyword arguments of `attention`.

    Returns:
        (batch, length, heads, head_dim), dense: `.flatten(2)` is a view.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention` does.
    """
    arguments.check_tensors(qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected (batch, length, 3, heads, head_dim)")
    if not qkv.dtype.is_floating_point or qkv.shape[3] < 1:
        raise ValueError(f"qkv is {qkv.dtype} with {qkv.shape[3]} heads, expected a floating-point dtype and 1 or more")
    if qkv.stride(4) != 1 and qkv.shape[4] > 1 and qkv.numel():
        raise ValueError(f"qkv has stride {qkv.stride(4)} in its last dimension, expected 1; call .contiguous() on it")
    (qkv,) = arguments.cast_for_autocast(qkv)
    return _attend(*_parts(qkv.detach()), qkv, **{**_DEFAULTS, **options})[0]


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views q, k and v (batch, heads, length, head_dim) of qkv (batch, length, 3, heads, head_dim)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attend(
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
    """Check the arguments of `attention` and return its output and the log-sum-exp.

    packed: the tensor that q, k and v are views of, or None. If given, implementations get (packed, None, None), and
        their output is (batch, length, heads, head_dim).
    """
    if packed is None:
        arguments.check_tensors(q=q, k=k, v=v)
        q, k, v = arguments.cast_for_autocast(q, k, v)
    arguments.check_numbers(scale=0 if scale is None else scale, dropout_p=dropout_p)
    arguments.check_flags(causal=causal)
    # What every backend refuses is checked here; native functions check again what keeps memory accesses in bounds,
    # for they can be called without this. _check is for tensors without memory and for the message: it takes longer.
    if torch.compiler.is_compiling() or not _C.attention_takes(q, k, v):
        _check(q, k, v)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    elif not abs(scale) <= 1e38:  # log2(e) times it is finite in float32
        raise ValueError(f"scale is {scale}, expected a finite number of at most 1e38")
    left, right = _check_window(window)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if dropout_p > 0.0 and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"dropout_p is {dropout_p}, but a CUDA graph would drop the same weights in every replay; expected 0"
        )
    cu_seqlens_q, cu_seqlens_k = check_boundaries(cu_seqlens, q, k)
    run = registry.select("attention", backend, q)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu") if dropout_p > 0.0 else None
    settings = Settings(cu_seqlens_q, cu_seqlens_k, seed, float(scale), causal, left, right, float(dropout_p))
    result: tuple[Tensor, Tensor] = run(q, k, v, settings) if packed is None else run(packed, None, None, settings)
    return result


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


# ---- torch: the formula in plain PyTorch -----------------------------------------------------------------------------


def _mask(q: Tensor, k: Tensor, settings: Settings) -> Tensor:
    """Return which keys each query attends to: bool, (batch or 1, 1, query_len, kv_len)."""
    batch, _, query_len, _ = q.shape
    kv_len = k.shape[2]
    key = torch.arange(kv_len, device=q.device)[None, None, :]
    position = torch.arange(query_len, device=q.device)[None, :, None] + kv_len - query_len
    allowed = torch.ones(1, query_len, kv_len, dtype=torch.bool, device=q.device)
    cu_q, cu_k = settings.cu_seqlens_q, settings.cu_seqlens_k
    if cu_q is not None and cu_k is not None:
        check_values(cu_q, cu_k, q, k)
        query_segment, query_position = segments(cu_q, batch, query_len)
        key_segment, key_position = segments(cu_k, batch, kv_len)
        key = key_position[:, None, :]
        position = (query_position + (cu_k.diff() - cu_q.diff())[query_segment])[:, :, None]
        allowed = query_segment[:, :, None] == key_segment[:, None, :]
    if settings.causal:
        allowed = allowed & (key <= position)
    if settings.window_left >= 0:
        allowed = allowed & (key >= position - settings.window_left)
    if settings.window_right >= 0:
        allowed = allowed & (key <= position + settings.window_right)
    return allowed[:, None]


def _attention_torch(q: Tensor, k: Tensor | None, v: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
    packed = k is None
    if k is None or v is None:
        q, k, v = _parts(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (tensor.to(wide).repeat_interleave(group, dim=1) for tensor in (k, v))
    allowed = _mask(q, k, settings)
    scores = settings.scale * _product(_Scores, q.to(wide), keys, allowed)  # (B, H, Tq, Tk)
    scores = scores.masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    no_keys = ~allowed.any(dim=-1, keepdim=True)  # queries whose output is 0, where softmax would give NaN
    probs = scores.masked_fill(no_keys, 0.0).softmax(dim=-1).masked_fill(~allowed, 0.0)
    if settings.seed is not None:
        keep = dropout_keep(scores.shape, settings.seed.to(q.device), settings.dropout_p, q.device)
        probs = probs * keep / (1.0 - settings.dropout_p)
    # Copies, because a view that was made without grad mode could not be modified in place with it
    out = _product(_WeightedSum, probs, values, allowed).transpose(1, 2)
    out = out.to(q.dtype, copy=True, memory_format=torch.contiguous_format)
    return out if packed else out.transpose(1, 2).clone(), lse.to(torch.float32)


def _product(kind: type[_Product], a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
    """Return _Scores or _WeightedSum of a and b; `allowed` says which elements of the scores or weights matter."""
    a, b = arguments.cast_for_autocast(a, b)
    result: Tensor = (kind.forward if registry.is_transformed() else kind.apply)(a, b, allowed)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _Scores(_Product):
    """a @ b.mT, with the gradients of the allowed elements only: a masked one of 0 times a NaN in a or b is NaN."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
        return a @ b.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, allowed = ctx.saved_tensors
        return _product(_WeightedSum, grad, b, allowed), _product(_WeightedSum, grad.mT, a, allowed.mT), None


class _WeightedSum(_Product):
    """a @ b, where a is 0 unless allowed; a row of b that is not finite reaches only the rows of a that allow it."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and type(b) is Tensor and b.is_cpu and not registry.is_transformed():
            batched = torch._C._functorch.is_legacy_batchedtensor(b)  # by autograd.grad(..., is_grads_batched=True)
            if not batched and b.isfinite().all():
                return a @ b
        nonfinite = ~b.isfinite()  # left out of the product
        reached = allowed.to(b.dtype) @ nonfinite.to(b.dtype) > 0
        return a @ b.masked_fill(nonfinite, 0.0) * torch.where(reached, math.nan, 1.0).to(b.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, allowed = ctx.saved_tensors
        grad_a = _product(_Scores, grad, b, allowed).masked_fill(~allowed, 0.0)
        return grad_a, _product(_WeightedSum, a.mT, grad, allowed.mT), None


# ---- the kernels -------------------------------------------------------------------------------------------------

_SETTINGS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, float scale, bool causal, int window_left, "
    "int window_right, float dropout_p, bool packed"
)
# packed: q, k and v are views of one tensor. Then the output is dense, (batch, length, heads, head_dim), and in the
# backward pass the first result is the gradient of that tensor, and the other two are empty.


def _like_heads(tensor: Tensor) -> Tensor:
    """Return an empty tensor of the same shape whose heads lie side by side in memory: merging them is a view."""
    _, heads, length, head_dim = shape = tensor.shape
    return tensor.new_empty_strided(shape, (length * heads * head_dim, head_dim, heads * head_dim, 1))


def _outputs(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Return empty out and lse; the last argument is `packed`."""
    batch, heads, length, head_dim = q.shape
    out = q.new_empty(batch, length, heads, head_dim) if others[-1] else _like_heads(q)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


def _gradients(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return empty gradients of q, k and v, and the tensor that they are parts of, which is empty if not `packed`."""
    if not packed:
        return q.new_empty(0), (_like_heads(q), _like_heads(k), _like_heads(v))
    batch, heads, length, head_dim = q.shape
    whole = q.new_empty(batch, length, 3, heads, head_dim)
    return whole, _parts(whole)


def _forward_body(kernel: native.Kernel, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q, packed := settings[-1])
    kernel(q, k, v, out.transpose(1, 2) if packed else out, lse, settings[:-1])
    return out, lse


def _forward_on_gpu(kernel: native.Kernel, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    cu_q, cu_k, *others = settings
    if cu_q is not None and cu_k is not None:
        check_values(cu_q, cu_k, q, k)
    return _forward_body(kernel, q, k, v, *_as_int64(cu_q, cu_k), *others)


def _as_int64(*cu_seqlens: Tensor | None) -> list[Tensor | None]:
    """Return cu_seqlens in the dtype and layout that the GPU kernels read."""
    return [None if cu is None else cu.long().contiguous() for cu in cu_seqlens]


def _backward_body(
    kernel: native.Kernel, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, *settings, packed = others
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    whole, gradients = _gradients(q, k, v, packed)
    if settings[1] is not None:  # kernels write no gradient for the keys of a document without queries
        gradients[1].zero_()
        gradients[2].zero_()
    kernel(grad_out, grad_lse, q, k, v, out, lse, *gradients, tuple(settings))
    return (whole, whole.new_empty(0), whole.new_empty(0)) if packed else gradients


def _backward_on_gpu(kernel: native.Kernel, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, (cu_q, cu_k, *others) = args[:7], args[7:]
    return _backward_body(kernel, *tensors, *_as_int64(cu_q, cu_k), *others)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    packed = others[-1]
    whole, gradients = _gradients(q, k, v, packed)
    return (whole, whole.new_empty(0), whole.new_empty(0)) if packed else gradients


_forward = native.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
    native.compiled("attention_forward", _forward_on_gpu)
    | native.compiled("attention_forward", _forward_body, ["cpu"])
    | native.triton("attention", "forward", _forward_on_gpu),
    _outputs,
)
_backward = native.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    native.compiled("attention_backward", _backward_on_gpu)
    | native.compiled("attention_backward", _backward_body, ["cpu"])
    | native.triton("attention", "backward", _backward_on_gpu),
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    """Takes q, k and v, or the tensor that they are parts of and two None."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, v: Tensor | None, settings: Settings, backend: str
    ) -> tuple[Tensor, Tensor]:
        tensors = (q, k, v) if k is not None and v is not None else _parts(q)
        out, lse = _forward(*tensors, *settings, k is None, backend)
        ctx.save_for_backward(q, k, v, out, lse, *settings[:3])
        ctx.settings, ctx.backend = settings[3:], backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_lse is not None:
            grad_lse = grad_lse.contiguous()
        packed = k is None
        if packed:
            q, k, v = _parts(q)
            grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
        gradients = _backward(
            grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, *ctx.settings, packed, ctx.backend
        )
        return *((gradients[0], None, None) if packed else gradients), None, None


_QKV: dict[str, tuple[int, ...]] = {"q": (2, 4, 9, 8), "k": (2, 2, 9, 8), "v": (2, 2, 9, 8)}
_DOCUMENTS = torch.tensor([0, 4, 9, 9, 18], device="cpu")
registry.register(
    Operation(
        "attention",
        {"torch": _attention_torch, **native.differentiable(_Attention)},
        samples=[
            Sample(
                "everything",
                attention_with_lse,
                {"q": (2, 4, 9, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8)},
                {
                    "causal": False,
                    "window": (3, 1),
                    "scale": 0.3,
                    "cu_seqlens": (_DOCUMENTS, torch.tensor([0, 2, 7, 7, 14], device="cpu")),
                    "dropout_p": 0.25,
                },
            ),
            Sample("plain", attention, dict.fromkeys("qkv", (2, 4, 9, 8))),
            Sample("window and lse", attention_with_lse, _QKV, {"causal": False, "window": (3, 1), "scale": 0.3}),
            Sample("documents", attention, _QKV, {"cu_seqlens": _DOCUMENTS}),
            Sample("packed", attention_qkvpacked, {"qkv": (2, 9, 3, 2, 8)}),
        ],
        # More than one tile, grouped queries and a ragged end
        first_use=lambda head_dim: Sample(
            "first use",
            attention,
            {"q": (1, 4, 150, head_dim), "k": (1, 2, 150, head_dim), "v": (1, 2, 150, head_dim)},
            {"window": (100, -1)},
        ),
        counterpart=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        per_head_dim=True,
    )
)
