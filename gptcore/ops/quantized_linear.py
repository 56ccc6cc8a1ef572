"""A linear layer whose weights are in GGUF's blocks of 32 numbers: q8_0 (8.5 bits a number) and q4_0 (4.5 bits).

The CPU kernel rounds each row of x to 8 bits in the same blocks, as llama.cpp does, and multiplies integers. A row of
its result has the same bits whatever the number of rows beside it and of threads. The other backends keep x as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C
from gptcore.ops import arguments, native, registry
from gptcore.ops.operation import Operation, Sample

BLOCK = 32  # numbers that share a float16 scale
BYTES = {"q8_0": 34, "q4_0": 18}  # of a block
DECODED = 2**22  # numbers of a weight that the backward has in memory at once, unless one column of blocks has more


def quantized_linear(
    x: Tensor, weight: Tensor, kind: str, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Return x @ dequantize(weight, kind).T + bias.

    Args:
        x: (..., in_features).
        weight: (out_features, bytes of a row), uint8, as `quantize` returns it. It gets no gradient; x and bias do.
        kind: "q8_0" or "q4_0".
        bias: (out_features,), in x's dtype or float32.
        backend: as for all operations; differentiable once, except `torch`.

    Returns:
        (..., out_features), in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with what was expected.
        TypeError: an argument has the wrong type.
        RuntimeError: the requested backend cannot run the call.
    """
    arguments.check_tensors(x=x, weight=weight)
    arguments.check_tensors(optional=True, bias=bias)
    check_blocks(weight, kind)
    in_features = weight.shape[1] // BYTES[kind] * BLOCK
    if x.dim() < 1 or not x.dtype.is_floating_point or x.shape[-1] != in_features:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, expected a floating-point dtype and (..., {in_features})"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in (x.dtype, torch.float32)):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}, expected {x.dtype} or float32 of ({weight.shape[0]},)"
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, expected {x.device} like x")
    if backend is None and registry.in_use() is None and x.is_cuda:
        # Before "cuda", which has no kernel for it
        backend = "triton" if registry.BACKENDS["triton"].refusal("quantized_linear", x) is None else "torch"
    out: Tensor = registry.select("quantized_linear", backend, x)(x, weight, bias, kind)
    return out


def describe_kernels() -> str:
    """Return where quantized layers are computed and how, for `gptcore info`."""
    bits = 8 if _C.cpu_isa() in ("avx512_bf16", "amx_bf16") else 16  # vpdpbusd, or pmaddwd after widening
    return (
        f"q8_0 and q4_0 on the CPU in gptcore's kernel: inputs rounded to 8 bits, dot products of {bits}-bit integers\n"
        "on a GPU in Triton; where Triton is unavailable, in PyTorch, which decodes the weights first"
    )


def check_blocks(weight: Tensor, kind: str) -> None:
    """Raise ValueError unless `weight` is a matrix of blocks of this kind."""
    if kind not in BYTES:
        raise ValueError(f"kind is {kind!r}, expected one of: {', '.join(BYTES)}")
    if weight.dtype != torch.uint8 or weight.dim() != 2 or weight.shape[1] % BYTES[kind]:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}, expected torch.uint8 and rows of blocks of "
            f"{BYTES[kind]} bytes; quantize(weight, {kind!r}) makes them"
        )


def quantize(weight: Tensor, kind: str) -> Tensor:
    """Return a matrix as blocks, uint8 (rows, bytes of a row): the bytes that the package gguf makes of it.

    Raises ValueError for a width that is not a multiple of 32, and for numbers that no float16 scale can represent.
    """
    if kind not in BYTES:
        raise ValueError(f"kind is {kind!r}, expected one of: {', '.join(BYTES)}")
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"the shape is {tuple(weight.shape)}, expected a matrix whose width is a multiple of {BLOCK}")
    blocks = weight.detach().float().unflatten(1, (-1, BLOCK))
    if kind == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
        whole = scaled.abs().floor()
        whole = whole + (2 * (scaled.abs() - whole)).floor()  # halves away from zero
        numbers = (scaled.sign() * whole).to(torch.int8).view(torch.uint8)
    else:
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        numbers = (blocks * torch.where(scale == 0, 0.0, 1 / scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
        numbers = numbers[..., : BLOCK // 2] | numbers[..., BLOCK // 2 :] << 4
    if not (narrow := scale.half()).isfinite().all():
        raise ValueError(f"a number of {float(weight.abs().max()):.6g} is too large for {kind}, whose scale is float16")
    return torch.cat([narrow.view(torch.uint8), numbers], -1).flatten(1)


def dequantize(weight: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of blocks, (..., bytes of a row), as (..., in_features)."""
    blocks = weight.unflatten(-1, (-1, BYTES[kind]))
    scale, numbers = blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:]
    if kind == "q8_0":
        values = numbers.contiguous().view(torch.int8).float()
    else:
        values = torch.cat([numbers & 15, numbers >> 4], -1).float() - 8
    return (values * scale).flatten(-2).to(dtype)


# ---- torch: the formula ----------------------------------------------------------------------------------------------


def _quantized_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, dequantize(weight, kind, x.dtype), None if bias is None else bias.to(x.dtype))


# ---- cpu: kernels/cpu/quantized_linear.cpp; triton: kernels/triton/quantized_linear.py -------------------------------


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _forward_kernel(kernel: native.Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    out = _output(x, weight, bias, kind)
    kernel(native.readable(x), weight, kind, bias, native.readable(out))
    return out


# All tensors are dense
_forward = native.define(
    "quantized_linear(Tensor x, Tensor weight, Tensor? bias, str kind) -> Tensor",
    {
        **native.compiled("quantized_linear_forward", _forward_kernel, ["cpu"]),
        **native.triton("quantized_linear", "forward", _forward_kernel),
    },
    _output,
)


def _grad_x(grad_out: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Return grad_out @ dequantize(weight, kind), a few columns of blocks at a time."""
    columns = max(1, DECODED // BLOCK // max(1, len(weight)))
    parts = weight.unflatten(1, (-1, BYTES[kind])).split(columns, 1)
    return torch.cat([grad_out @ dequantize(part.flatten(1), kind, grad_out.dtype) for part in parts], -1)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, backend: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.kind, ctx.bias_dtype, ctx.needs = kind, None if bias is None else bias.dtype, ctx.needs_input_grad
        return _forward(x, weight, bias, kind, backend)

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            _C.check_storage((weight,))
        grad_x = _grad_x(grad_out, weight, ctx.kind) if ctx.needs[0] else None
        rows = grad_out.reshape(-1, grad_out.shape[-1])
        grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs[2] else None
        return grad_x, None, grad_bias, None, None


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Any, ...]:
    return x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), kind


def _both_kinds(
    x: Tensor, bias: Tensor, *, weights: tuple[Tensor, ...], spread: bool = False, backend: str | None = None
) -> Tensor:
    """Return the results for weights of both kinds side by side. With spread each number of x is alone in its block."""
    if spread:
        x = F.pad(x.unsqueeze(-1), (5, BLOCK - 6)).flatten(-2)
    outs = [quantized_linear(x, w, kind, bias, backend=backend) for kind, w in zip(BYTES, weights, strict=True)]
    return torch.cat(outs, -1)


def _weights(out_features: int, blocks: int) -> tuple[Tensor, ...]:
    count = out_features * blocks * BLOCK
    matrix = torch.arange(count, dtype=torch.float32, device="cpu").sin().view(out_features, -1)
    return tuple(quantize(matrix, kind) for kind in BYTES)


registry.register(
    Operation(
        "quantized_linear",
        {
            **dict.fromkeys(registry.WITH_TORCH, _quantized_linear_torch),
            **native.differentiable(_QuantizedLinear, ["cpu", "triton"], _dense),
        },
        # The CPU kernel rounds x to 8 bits, which is exact for a number that is alone in its block
        samples=[
            Sample("spread", _both_kinds, {"x": (5, 3), "bias": (7,)}, {"weights": _weights(7, 3), "spread": True})
        ],
        first_use=lambda _: Sample(
            "first use", _both_kinds, {"x": (70, 96), "bias": (70,)}, {"weights": _weights(70, 3)}
        ),
    )
)
