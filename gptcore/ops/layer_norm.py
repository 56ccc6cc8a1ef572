"""Layer norm, with the residual connection that stands before it added in the same pass.

Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450).
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from gptcore.ops import native, registry


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; statistics in float32.

    Args:
        x: (..., width).
        weight, bias: (width,), in x's dtype or float32; bias is optional.
        residual: added to x first: the same shape, x's dtype or float32. The sum has residual's dtype, and so has the
            result.

    Returns:
        The normalised tensor, in x's shape; with a residual, that of the sum, and the sum itself: (out, x + residual).

    Raises:
        ValueError: shapes, dtypes or arguments that do not fit, with what was expected.
        TypeError: an argument that must be a tensor or a number is none.
        RuntimeError: the backend that was asked for cannot serve the call.
    """
    native.check_tensors(x=x, weight=weight)
    native.check_tensors(optional=True, bias=bias, residual=residual)
    native.check_numbers(eps=eps)
    _check(x, weight, bias, residual)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a finite number that is not negative")
    out, total = registry.select("layer_norm", backend, x)(x, weight, bias, residual, float(eps))
    return out if residual is None else (out, total)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device  # each is made from nothing when it is asked for
    width = shape[-1:]
    if x.dim() < 1 or width[0] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., width) with a width of at least 1")
    if not dtype.is_floating_point:
        raise ValueError(f"x is {dtype}, expected a floating-point dtype")
    for name, tensor, expected in (("weight", weight, width), ("bias", bias, width), ("residual", residual, shape)):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} for x of {tuple(shape)}"
            )
        if tensor.dtype not in (dtype, torch.float32) or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} or torch.float32 on {device}"
            )


# ---- torch: the formula in plain PyTorch -----------------------------------------------------------------------------


def _layer_norm_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    centred = centred - centred.mean(dim=-1, keepdim=True)  # again: the mean was rounded
    out = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight
    if bias is not None:
        out = out + bias
    return out.to(total.dtype), total


# ---- the kernels -----------------------------------------------------------------------------------------------------


def _forward_body(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = native.kernels(backend, "layer_norm")
    if backend == "triton":
        result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.forward(x, weight, bias, residual, eps)
        return result
    (out, total, mean, rstd), shape = _outputs(x, weight, bias, residual), native.rows_and_width(x)
    residual, total_rows = (None, None) if residual is None else (residual.view(shape), total.view(shape))
    kernels.layer_norm_forward(
        x.view(shape), residual, weight, bias, out.view(shape), total_rows, mean, rstd, eps,
        native.execution(backend, x),
    )  # fmt: skip
    return out, total, mean, rstd


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = x if residual is None else residual
    total = like.new_empty(0) if residual is None else torch.empty_like(like)
    mean = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return torch.empty_like(like), total, mean, torch.empty_like(mean)


def _backward_body(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = native.kernels(backend, "layer_norm")
    if backend == "triton":
        result: tuple[Tensor, Tensor, Tensor] = kernels.backward(grad_out, grad_total, total, weight, mean, rstd, bias)
        return result
    grad_x, grad_weight, grad_bias = _gradients(grad_out, grad_total, total, weight, mean, rstd, bias)
    shape = native.rows_and_width(total)
    kernels.layer_norm_backward(
        grad_out.view(shape), None if grad_total is None else grad_total.view(shape), total.view(shape), weight, mean,
        rstd, grad_x.view(shape), grad_weight, grad_bias if bias else None, native.execution(backend, total),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _gradients(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(total), torch.empty_like(weight), weight.new_empty(weight.shape if bias else (0,))


# Dense, weight and bias in float32. Outputs have x's shape: autograd lets no one modify a view that a Function returns.
_forward = native.define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward_body,
    _outputs,
)
_backward = native.define(
    "layer_norm_backward(Tensor grad_out, Tensor? grad_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd, "
    "bool bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    _gradients,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        wide = weight.float().contiguous()
        out, total, mean, rstd = _forward(
            x,
            wide,
            None if bias is None else bias.float().contiguous(),
            None if residual is None else residual.contiguous(),
            eps,
            backend,
        )
        ctx.save_for_backward(x if residual is None else total, wide, mean, rstd)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.has_residual, ctx.backend = residual is not None, backend
        ctx.set_materialize_grads(False)
        return out, None if residual is None else total

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_out = torch.zeros_like(total) if grad_out is None else grad_out.contiguous()
        if grad_total is not None:
            grad_total = grad_total.contiguous()
        grad, grad_weight, grad_bias = _backward(
            grad_out, grad_total, total, weight, mean, rstd, bias_dtype is not None, ctx.backend
        )
        return (
            grad.to(x_dtype),
            grad_weight.to(weight_dtype),
            None if bias_dtype is None else grad_bias.to(bias_dtype),
            grad if ctx.has_residual else None,
            None,
            None,
        )


registry.BACKENDS["torch"].implementations["layer_norm"] = _layer_norm_torch
native.implement("layer_norm", _LayerNorm)
