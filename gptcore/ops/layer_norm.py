"""Layer norm, fused with the residual addition before it.

Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450).
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.ops import arguments, native, registry
from gptcore.ops.operation import Operation, Sample


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *,
    residual: None = ..., out_dtype: torch.dtype | None = ..., eps: float = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *,
    residual: Tensor, out_dtype: torch.dtype | None = ..., eps: float = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; statistics are float32.

    Args:
        x: (..., width).
        weight, bias: (width,), in x's dtype or float32; bias is optional.
        residual: added to x first; x's shape, x's dtype or float32. Its dtype is that of both outputs.
        out_dtype: of `out`; None is the dtype of residual, or of x. Where that is float32, it may be bfloat16 or
            float16 (that of a 16-bit x), which the next product reads under torch.autocast: the bits, also of the
            gradients, are those of a cast of `out`, without its launch. residual_out keeps its dtype.

    Returns:
        out, in x's shape; with a residual (out, residual_out), where residual_out = x + residual. The backward pass
        reads residual_out, as that of F.layer_norm reads its input: it raises after an in-place change.

    Raises:
        ValueError: shapes, dtypes or arguments that do not fit, with what was expected.
        TypeError: an argument has the wrong type.
        RuntimeError: the requested backend cannot run the call.
    """
    arguments.check_tensors(x=x, weight=weight)
    arguments.check_tensors(optional=True, bias=bias, residual=residual)
    arguments.check_numbers(eps=eps)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., width) with a width of at least 1")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}, expected a floating-point dtype")
    arguments.check_like(x, x.shape[-1:], weight=weight, bias=bias)
    if residual is not None:
        arguments.check_like(x, x.shape, residual=residual)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a finite number that is not negative")
    if out_dtype is not None:
        _check_out_dtype(out_dtype, x.dtype, x.dtype if residual is None else residual.dtype)
    out, residual_out = registry.select("layer_norm", backend, x)(x, weight, bias, residual, float(eps), out_dtype)
    return out if residual is None else (out, residual_out)


def _check_out_dtype(out_dtype: object, dtype: torch.dtype, normalised: torch.dtype) -> None:
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype is {out_dtype!r}, expected a torch.dtype")
    narrow = {torch.bfloat16, torch.float16} if dtype == torch.float32 else {dtype}
    expected = {normalised} | (narrow if normalised == torch.float32 else set())
    if out_dtype not in expected:
        raise ValueError(f"out_dtype is {out_dtype}, expected {' or '.join(sorted(map(str, expected)))}")


# ---- torch: the formula in plain PyTorch -----------------------------------------------------------------------------


def _layer_norm_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    residual_out = x if residual is None else x + residual
    wide = residual_out.to(torch.promote_types(residual_out.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    centred = centred - centred.mean(dim=-1, keepdim=True)  # again: the mean was rounded
    variance = centred.square().mean(dim=-1, keepdim=True)
    overflow = variance - variance  # NaN if the squares overflow: the row must not become zeros
    out = centred * torch.rsqrt(variance + eps + overflow) * weight
    if bias is not None:
        out = out + bias
    return out.to(residual_out.dtype).to(out_dtype or residual_out.dtype), residual_out


# ---- the kernels -----------------------------------------------------------------------------------------------------

# They take dense tensors. On a GPU weight and bias are both in the dtype of residual_out or in float32; on the CPU in
# float32. Their gradients have their dtype. Without a residual, residual_out is empty. Outputs have x's shape: autograd
# allows no in-place change of a view that a Function returned.


def _forward_native(
    kernel: native.Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (out, residual_out, mean, rstd), readable = _outputs(x, weight, bias, residual, *settings), native.readable
    added = None if residual is None else readable(residual_out)
    kernel(readable(x), readable(residual), weight, bias, readable(out), added, mean, rstd, settings[0])
    return out, residual_out, mean, rstd


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = x if residual is None else residual
    residual_out = like.new_empty(0) if residual is None else torch.empty_like(like)
    mean = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return torch.empty_like(like, dtype=out_dtype), residual_out, mean, torch.empty_like(mean)


def _backward_native(
    kernel: native.Kernel, grad_out: Tensor, grad_residual_out: Tensor | None, x: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (mean, rstd, bias, narrow), readable = others, native.readable
    grad_x, grad_narrow, grad_weight, grad_bias = _gradients(grad_out, grad_residual_out, x, weight, *others)
    kernel(
        readable(grad_out), readable(grad_residual_out), readable(x), weight, mean, rstd, readable(grad_x),
        readable(grad_narrow) if narrow else None, grad_weight, grad_bias if bias else None,
    )  # fmt: skip
    return grad_x, grad_narrow, grad_weight, grad_bias


def _gradients(
    grad_out: Tensor, grad_residual_out: Tensor | None, x: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, bias, narrow = others
    grad_narrow = torch.empty_like(grad_out) if narrow else grad_out.new_empty(0)
    grad_bias = weight.new_empty(weight.shape if bias else (0,))
    return torch.empty_like(x), grad_narrow, torch.empty_like(weight), grad_bias


_forward = native.define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, ScalarType? out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    native.compiled("layer_norm_forward", _forward_native) | native.triton("layer_norm", "forward", _forward_native),
    _outputs,
)
# x is the normalised tensor: residual_out, if there is a residual. The second gradient, with `narrow`, is the first in
# the dtype of grad_out.
_backward = native.define(
    "layer_norm_backward(Tensor grad_out, Tensor? grad_residual_out, Tensor x, Tensor weight, Tensor mean, "
    "Tensor rstd, bool bias, bool narrow) -> (Tensor, Tensor, Tensor, Tensor)",
    native.compiled("layer_norm_backward", _backward_native)
    | native.triton("layer_norm", "backward", _backward_native),
    _gradients,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, residual_out, mean, rstd = _forward(x, weight, bias, residual, *settings)
        ctx.save_for_backward(x if residual is None else residual_out, weight, mean, rstd)
        ctx.dtype, ctx.has_bias, ctx.has_residual = x.dtype, bias is not None, residual is not None
        ctx.backend = settings[-1]
        ctx.set_materialize_grads(False)
        return out, None if residual is None else residual_out

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_residual_out: Tensor | None) -> tuple[Tensor | None, ...]:
        normalised, weight, mean, rstd = ctx.saved_tensors
        grad_out = torch.zeros_like(normalised) if grad_out is None else grad_out.contiguous()
        if grad_residual_out is not None:
            grad_residual_out = grad_residual_out.contiguous()
        narrow = ctx.dtype == grad_out.dtype != normalised.dtype
        grad, grad_narrow, grad_weight, grad_bias = _backward(
            grad_out, grad_residual_out, normalised, weight, mean, rstd, ctx.has_bias, narrow, ctx.backend
        )
        grad_x, grad_residual = grad_narrow if narrow else grad.to(ctx.dtype), grad if ctx.has_residual else None
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, grad_residual, None, None, None


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *settings: Any) -> tuple[Any, ...]:
    dtype = (x if residual is None else residual).dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return _wide(x, weight, bias, residual, *settings)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return x.contiguous(), weight, bias, None if residual is None else residual.contiguous(), *settings


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *settings: Any) -> tuple[Any, ...]:
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    return x.contiguous(), weight, bias, None if residual is None else residual.contiguous(), *settings


_SHAPES: dict[str, tuple[int, ...]] = {"x": (3, 5, 12), "weight": (12,), "bias": (12,)}
registry.register(
    Operation(
        "layer_norm",
        {
            "torch": _layer_norm_torch,
            **native.differentiable(_LayerNorm, ["cuda", "triton", "simt"], prepare=_dense),
            **native.differentiable(_LayerNorm, ["cpu"], prepare=_wide),
        },
        samples=[
            Sample("residual", layer_norm, {**_SHAPES, "residual": (3, 5, 12)}, {"eps": 1e-3}),
            Sample("plain", layer_norm, _SHAPES),
            Sample("without bias", layer_norm, {"x": (5, 12), "weight": (12,)}),
        ],
        counterpart=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        first_use=lambda _: Sample("first use", layer_norm, {"x": (70, 776), "weight": (776,), "bias": (776,)}),
    )
)
