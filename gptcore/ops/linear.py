"""A linear layer: our kernel for CPUs, and PyTorch's F.linear.

The kernel fuses the casts of weights and gradients under autocast, the bias and its gradient with the matrix product.
A row of its result has the same bits whatever the number of rows beside it and of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C
from gptcore.ops import arguments, native, registry
from gptcore.ops.operation import Operation, Sample

# The dtypes in which forward and backward together are faster in the kernel than in PyTorch, with 16 to 1024 rows, by
# instruction set. Measured against MKL and oneDNN restricted to the same set: float32 0.8 to 1.0 times as fast,
# bfloat16 1.05 to 1.15 on avx512_bf16 and 2 to 28 below it, float16 3 to 40. Not measured with AMX, which PyTorch uses.
_HALVES = (torch.bfloat16, torch.float16)
TRAINED = {
    "baseline": _HALVES,
    "avx2": _HALVES,
    "avx512": _HALVES,
    "avx512_bf16": _HALVES,
    "amx_bf16": (torch.float16,),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Return x @ weight.T + bias, as torch.nn.functional.linear does.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), in x's dtype; any floating-point dtype but float64 under torch.autocast.
        bias: (out_features,), in weight's dtype.
        backend: `torch` is F.linear, on any device; its last bits may depend on the number of threads. `cpu` is our
            kernel, differentiable once; under autocast it reads the weights and writes their gradients in their own
            dtype. By default, and after ops.use("cpu"), the kernel is used where nothing is differentiated, and in
            training where it is the faster one, see `TRAINED`.

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
    if backend is None and registry.in_use() in (None, "cpu") and not _takes(x, weight, bias, dtype):
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


def uses_kernel(dtype: torch.dtype, training: bool) -> bool:
    """Return whether the kernel computes a linear layer in `dtype` on the CPU by default.

    Without gradients it always does, so that a row gets the same bits alone and in any batch.
    """
    return dtype in registry.FLOATS and (not training or dtype in TRAINED[_C.cpu_isa()])


def describe_choice() -> str:
    """Return which linear layers the kernel computes and why, for `gptcore info`."""
    ours, theirs = (
        ", ".join(str(d).removeprefix("torch.") for d in registry.FLOATS if uses_kernel(d, training=True) == kernel)
        for kernel in (True, False)
    )
    text = (
        "without gradients in gptcore's kernel: a row has the same bits alone and in any batch\n"
        f"in training, what is faster: {ours} in gptcore's kernel, {theirs} in PyTorch"
    )
    if _C.cpu_isa() == "amx_bf16":
        text += "\nAMX: for bfloat16 in training, by PyTorch; the kernel uses AVX-512 BF16 (not measured with AMX)"
    return text


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether the kernel computes this call by default."""
    if not x.is_cpu or torch.compiler.is_compiling() or registry.is_transformed():
        return False
    training = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return (
        uses_kernel(dtype, training)
        and not native.is_watched(x, weight, bias)
        and x.layout is weight.layout is torch.strided
        and x.dim() <= 8  # the limit of native functions
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
    kernel(grad_out, x, weight, *(g if need else None for g, need in zip(gradients, settings[-1], strict=True)), None)
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


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Any, ...]:
    return x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), dtype


registry.register(
    Operation(
        "linear",
        {**dict.fromkeys(registry.WITH_TORCH, _linear_torch), **native.differentiable(_Linear, ["cpu"], _dense)},
        samples=[
            Sample("with bias", linear, {"x": (3, 5, 12), "weight": (7, 12), "bias": (7,)}),
            Sample("plain", linear, {"x": (5, 12), "weight": (7, 12)}),
        ],
        counterpart=F.linear,
    )
)
