"""log2(e), ln(2), and two operations that are one instruction when compiled and need help in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from gptcore.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b in float32."""
    if _INTERPRETED:  # the interpreter multiplies bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return float32 x rounded to dtype."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
