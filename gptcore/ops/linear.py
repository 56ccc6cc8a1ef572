"""A linear layer: PyTorch's F.linear, and a bfloat16 kernel for CPUs with AVX-512 BF16.

The kernel fuses the casts of weights and gradients under autocast, the bias and its gradient with the matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C
from gptcore.ops import arguments, native, registry
from gptcore.ops.operation import Operation, Sample

FASTER_ON = "avx512_bf16"  # the instruction set; with AMX, PyTorch's matmuls are several times as fast
FASTER_FROM = 256  # rows; with fewer, packing a large weight takes longer than the fusion saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Return x @ weight.T + bias, as torch.nn.functional.linear does.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), in x's dtype; any floating-point dtype but float64 under torch.autocast.
        bias: (out_features,), in weight's dtype.
        backend: `torch` is F.linear, on any device; its last bits may depend on the number of threads. `cpu` is our
            kernel, differentiable once; under autocast it reads the weights and writes their gradients in their own
            dtype. By default, and after ops.use("cpu"), the kernel is used only where it is faster: in bfloat16, see
            `_is_faster`.

    Returns:
        (..., out_features), in x's dtype, or autocast's.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with what was expected.
        TypeError: an argument has the wrong type.
        RuntimeError: the requested backend cannot run the call.
    """
    arguments.check_tensors(x=x, weight=weight)
    arguments.check_tensors(optional=True, bias=bias)
    dtype = _check(x, weight, bias)
    if backend is None and registry.in_use() in (None, "cpu") and not _is_faster(x, weight, bias, dtype):
        backend = "torch"
    # The kernel reads float32 and `dtype`; other dtypes under autocast are cast here
    if not {x.dtype, weight.dtype, dtype if bias is None else bias.dtype} <= {dtype, torch.float32}:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = registry.select("linear", backend, x)(x, weight, bias, dtype)
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Return the dtype of the result. Raises ValueError for arguments that do not fit."""
    if x.dim() < 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected a floating-point dtype and (..., width)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (out_features, {x.shape[-1]}) for x's width"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) like weight's rows")
    device, dtype, autocast = x.device, x.dtype, None
    if dtype != torch.float64 and (autocast := arguments.autocast_dtype(x)) is not None:
        dtype = autocast
    for name, other in (("weight", weight), ("bias", bias)):
        if other is None:
            continue
        if other.device != device:
            raise ValueError(f"{name} is on {other.device}, expected {device} like x")
        if other.dtype != dtype and (
            autocast is None or not other.dtype.is_floating_point or other.dtype == torch.float64
        ):
            raise ValueError(f"{name} is {other.dtype}, expected {dtype}{' like x' if autocast is None else ''}")
    return dtype


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    return (
        dtype is torch.bfloat16
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not registry.is_transformed()
        and _C.cpu_isa() == FASTER_ON
        and not native.is_watched(x, weight, bias)
        and x.layout is weight.layout is torch.strided
        and x.dim() <= 8  # the limit of native functions
        and math.prod(x.shape[:-1]) >= FASTER_FROM
    )


# ---- torch: PyTorch's own --------------------------------------------------------------------------------------------


def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x, weight, bias)


# ---- cpu: kernels/cpu/linear.cpp -------------------------------------------------------------------------------------


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _forward_native(
    kernel: native.Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = _output(x, weight, bias, dtype)
    kernel(x, weight, bias, out)
    return out


def _gradients(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    in_features: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (*grad_out.shape[:-1], in_features), (grad_out.shape[-1], in_features), (grad_out.shape[-1],)
    grad_x, grad_weight, grad_bias = (
        grad_out.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, (x_dtype, weight_dtype, bias_dtype), needs, strict=True)
    )
    return grad_x, grad_weight, grad_bias


def _backward_native(
    kernel: native.Kernel, grad_out: Tensor, x: Tensor | None, weight: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients(grad_out, x, weight, *settings)
    kernel(grad_out, x, weight, *(g if need else None for g, need in zip(gradients, settings[-1], strict=True)))
    return gradients


# All tensors are dense. grad_weight needs x, grad_x needs weight; gradients that are not needed are empty.
_forward = native.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor",
    native.compiled("linear_forward", _forward_native, ["cpu"]),
    _output,
)
_backward = native.define(
    "linear_backward(Tensor grad_out, Tensor? x, Tensor? weight, SymInt in_features, ScalarType x_dtype, "
    "ScalarType weight_dtype, ScalarType bias_dtype, bool[] needs) -> (Tensor, Tensor, Tensor)",
    native.compiled("linear_backward", _backward_native, ["cpu"]),
    _gradients,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        ctx.settings = x.shape[-1], x.dtype, weight.dtype, dtype if bias is None else bias.dtype, needs
        ctx.backend = backend
        return _forward(x, weight, bias, dtype, backend)

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.settings[-1]
        gradients = _backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings, ctx.backend)
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


registry.register(
    Operation(
        "linear",
        {**dict.fromkeys(registry.WITH_TORCH, _linear_torch), **native.differentiable(_Linear, ["cpu"])},
        samples=[
            Sample("with bias", linear, {"x": (3, 5, 12), "weight": (7, 12), "bias": (7,)}),
            Sample("plain", linear, {"x": (5, 12), "weight": (7, 12)}),
        ],
        counterpart=F.linear,
    )
)
