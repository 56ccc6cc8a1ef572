"""A linear layer, for which bfloat16 on a CPU has a kernel of its own.

PyTorch's matmuls are hard to beat, and are what runs all others. In bfloat16 they cost a small layer as much again for
what stands around them: casts of weights and gradients under autocast, the bias, its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C
from gptcore.ops import native, registry

FASTER_ON = "avx512_bf16"  # the instruction set; where there is AMX, PyTorch's matmuls are several times as fast
FASTER_FROM = 256  # rows; with fewer, packing a large weight takes longer than what is saved


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), in x's dtype; inside torch.autocast in any.
        bias: (out_features,), in weight's dtype.
        backend: `torch` is F.linear, also on other devices; `cpu` has products of bfloat16 summed in float32, and under
            autocast reads the weights, and writes their gradients, in the dtype that they have. If none is asked for,
            `cpu` is taken where it is faster.

    Returns:
        (..., out_features), in x's dtype, or autocast's.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with what was expected.
        TypeError: an argument that must be a tensor is none.
        RuntimeError: the backend that was asked for cannot serve the call.
    """
    native.check_tensors(x=x, weight=weight)
    native.check_tensors(optional=True, bias=bias)
    dtype = _check(x, weight, bias)
    if backend is None and registry.in_use() is None and not _is_faster(x, weight, dtype):
        backend = "torch"
    # Of what autocast takes, these are read as they are
    if not all(tensor is None or tensor.dtype in (dtype, torch.float32) for tensor in (x, weight, bias)):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = registry.select("linear", backend, x)(x, weight, bias, dtype)
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the result."""
    if x.dim() < 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected a floating-point dtype and (..., width)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (out_features, {x.shape[-1]}) for x's width"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) like weight's rows")
    others = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    dtype, autocast = x.dtype, None
    device = "cpu" if x.is_cpu else x.device.type  # made from nothing each time
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = autocast = torch.get_autocast_dtype(device)
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, expected {x.device} like x")
        castable = autocast is not None and other.dtype.is_floating_point and other.dtype != torch.float64
        if other.dtype != dtype and not castable:
            raise ValueError(f"{name} is {other.dtype}, expected {dtype} like x")
    return dtype


def _is_faster(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return (
        dtype is torch.bfloat16
        and x.is_cpu
        and not torch.compiler.is_compiling()  # which joins F.linear with its neighbours
        and type(weight) in (Tensor, torch.nn.Parameter)  # others, of quantized weights say, come with an F.linear
        and _C.cpu_isa() == FASTER_ON
        and math.prod(x.shape[:-1]) >= FASTER_FROM
    )


# ---- torch: PyTorch's own -----------------------------------------------------------------------------------------


def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x, weight, bias)


# ---- cpu: kernels/cpu/linear.cpp -------------------------------------------------------------------------------------


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _forward_body(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = _output(x, weight, bias, dtype)
    _C.linear_forward(x, weight, bias, out, torch.get_num_threads())
    return out


def _gradients(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        torch.empty_like(bias) if bias is not None and need_bias else x.new_empty(0),
    )


def _backward_body(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = _gradients(grad_out, x, weight, bias, need_x, need_weight, need_bias)
    _C.linear_backward(
        grad_out, x, weight, grad_x if need_x else None, grad_weight if need_weight else None,
        grad_bias if need_bias else None, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


# All dense. Gradients that are not needed are empty.
_forward = native.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor", _forward_body, _output
)
_backward = native.define(
    "linear_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, bool need_x, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    _gradients,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, weight, bias)
        return _forward(x, weight, bias, dtype)

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        gradients = _backward(grad_out.contiguous(), *ctx.saved_tensors, *needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None


for _name in registry.WITH_TORCH:
    registry.BACKENDS[_name].implementations["linear"] = _linear_torch
native.implement("linear", _Linear, ["cpu"])
