"""GELU, fused with the addition of a bias before it.

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units" (arXiv:1606.08415).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.ops import arguments, native, registry
from gptcore.ops.operation import Operation, Sample


def gelu(x: Tensor, *, bias: Tensor | None = None, approximate: str = "tanh", backend: str | None = None) -> Tensor:
    """Return GELU(x + bias), elementwise.

    Args:
        x: any shape; with a bias, (..., width).
        bias: (width,), in x's dtype or float32.
        approximate: "tanh" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which GPT-1, 2 and 3 use; "none" is the
            exact 0.5 x (1 + erf(x / sqrt(2))).

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or arguments that do not fit, with what was expected.
        TypeError: an argument has the wrong type.
        RuntimeError: the requested backend cannot run the call.
    """
    arguments.check_tensors(x=x)
    arguments.check_tensors(optional=True, bias=bias)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate is {approximate!r}, expected 'tanh' or 'none'")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}, expected a floating-point dtype")
    if bias is not None:
        if x.dim() < 1 or bias.shape != x.shape[-1:]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected the width of x, whose shape is {tuple(x.shape)}"
            )
        if bias.dtype not in (x.dtype, torch.float32) or bias.device != x.device:
            raise ValueError(
                f"bias is {bias.dtype} on {bias.device}, expected {x.dtype} or torch.float32 on {x.device}"
            )
    out: Tensor = registry.select("gelu", backend, x)(x, bias, approximate == "tanh")
    return out


# ---- torch: the formula in plain PyTorch -----------------------------------------------------------------------------


def _gelu_torch(x: Tensor, bias: Tensor | None, tanh_form: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias
    bounded = wide.masked_fill(wide < -32.0, -32.0).masked_fill(wide > 32.0, 32.0)  # inf * 0 would be NaN
    if tanh_form:
        curve = torch.tanh(math.sqrt(2.0 / math.pi) * (bounded + 0.044715 * bounded**3))
    else:
        curve = torch.erf(bounded / math.sqrt(2.0))
    return torch.where(wide > 32.0, wide, 0.5 * bounded * (1.0 + curve)).to(x.dtype)


# ---- the kernels -----------------------------------------------------------------------------------------------------

# They take dense tensors, with bias in float32. Outputs are not views: autograd forbids in-place changes of a view that
# a Function returned.


def _forward_native(kernel: native.Kernel, x: Tensor, bias: Tensor | None, tanh_form: bool) -> Tensor:
    out, readable = torch.empty_like(x), native.readable
    kernel(readable(x), bias, readable(out), tanh_form)
    return out


def _backward_native(
    kernel: native.Kernel, grad_out: Tensor, x: Tensor, bias: Tensor | None, tanh_form: bool
) -> tuple[Tensor, Tensor]:
    (grad_x, grad_bias), readable = _gradients(grad_out, x, bias), native.readable
    kernel(readable(grad_out), readable(x), bias, readable(grad_x), None if bias is None else grad_bias, tanh_form)
    return grad_x, grad_bias


def _gradients(grad_out: Tensor, x: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


_forward = native.define(
    "gelu_forward(Tensor x, Tensor? bias, bool tanh_form) -> Tensor",
    native.compiled("gelu_forward", _forward_native) | native.triton("gelu", "forward", _forward_native),
    lambda x, *_: torch.empty_like(x),
)
_backward = native.define(
    "gelu_backward(Tensor grad_out, Tensor x, Tensor? bias, bool tanh_form) -> (Tensor, Tensor)",
    native.compiled("gelu_backward", _backward_native) | native.triton("gelu", "backward", _backward_native),
    _gradients,
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tanh_form: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.settings = tanh_form, backend
        return _forward(x, bias, tanh_form, backend)

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        grad, grad_bias = _backward(grad_out.contiguous(), x, bias, *ctx.settings)
        return grad, None if bias is None else grad_bias, None, None


def _dense(x: Tensor, bias: Tensor | None, tanh_form: bool) -> tuple[Tensor, Tensor | None, bool]:
    return x.contiguous(), None if bias is None else bias.float().contiguous(), tanh_form


registry.register(
    Operation(
        "gelu",
        {"torch": _gelu_torch, **native.differentiable(_Gelu, prepare=_dense)},
        samples=[
            Sample("with bias", gelu, {"x": (3, 5, 12), "bias": (12,)}, {"approximate": "none"}),
            Sample("plain", gelu, {"x": (3, 5, 12)}),
        ],
        counterpart=functools.partial(F.gelu, approximate="tanh"),
        first_use=lambda _: Sample("first use", gelu, {"x": (70, 776), "bias": (776,)}),
    )
)
