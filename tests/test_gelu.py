"""ops.gelu against its formula in float64, by the rule of grid.py, and its edges."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from grid import BF16, DTYPES, F16, F32, F64, check, covering, leaves, over, randn, there
from torch import Tensor

from gptcore import ops


@dataclass(frozen=True)
class Gelu:
    shape: tuple[int, ...] = (5, 64)
    approximate: str = "tanh"
    bias: str | None = None  # None, "same" dtype as x, or "float32"
    scale: float = 2.0
    dtype: torch.dtype = F32


def gelu_formula(x: Tensor, approximate: str) -> Tensor:
    """By forms that do not cancel where x is far below zero: (1 + tanh u) / 2 is a sigmoid, 1 + erf is erfc."""
    if approximate == "tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * 0.5 * torch.erfc(-x / math.sqrt(2))


def gelu_results(run: Callable[..., Tensor], case: Gelu, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    bias_dtype = F32 if case.bias == "float32" else case.dtype
    x, bias = leaves(
        randn(*case.shape, scale=case.scale, dtype=case.dtype),
        randn(case.shape[-1], seed=1, dtype=bias_dtype) if case.bias else None,
        dtype=dtype,
    )
    out = run(x, bias)
    out.backward(randn(*case.shape, seed=2, dtype=case.dtype).to(out.dtype))
    return {"out": out.detach(), "dx": x.grad} | ({} if bias is None else {"dbias": bias.grad})


@functools.cache
def gelu_expected(case: Gelu) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    def add(x: Tensor, bias: Tensor | None) -> Tensor:
        return x if bias is None else x + bias

    return (
        gelu_results(lambda x, bias: gelu_formula(add(x, bias), case.approximate), case, F64),
        gelu_results(lambda x, bias: F.gelu(add(x, bias).to(x.dtype), approximate=case.approximate), case),
    )


GELUS = [
    Gelu(**axes)
    for axes in covering(
        shape=[
            (1, 1),
            (3, 2),
            (4, 13),
            (2, 3, 16),
            (65, 17),
            (130, 63),
            (7, 1000),
            (3000, 16),
            (2, 0),
            (0, 5),
            (9000,),
        ],
        approximate=["tanh", "none"],
        bias=[None, "same", "float32"],
        dtype=list(DTYPES),
        scale=[0.01, 2.0, 100.0],
    )
]
GELUS += [Gelu(shape=(100_000, 16), bias="float32")]  # a sum over many rows
FEW = [case for case in GELUS if math.prod(case.shape) < 10_000]


@over(GELUS, FEW)
def test_gelu(backend: str, case: Gelu) -> None:
    def run(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return ops.gelu(x, bias=bias, approximate=case.approximate, backend=backend)

    got = gelu_results(there(run, backend), case)
    assert got["out"].dtype == case.dtype
    ref, theirs = gelu_expected(case)
    for name in ref:
        check(name, got[name], ref[name], theirs[name])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_gelu_of_every_16_bit_number(backend: str, dtype: torch.dtype, approximate: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).requires_grad_()
    out = ops.gelu(x, approximate=approximate, backend=backend)
    out.backward(torch.ones_like(x))
    wide = x.detach().double().requires_grad_()
    ref = gelu_formula(wide, approximate)
    ref.backward(torch.ones_like(wide))
    assert torch.equal(out[x.isnan()].isnan(), x[x.isnan()].isnan())
    assert out[x == math.inf] == math.inf
    finite = x.isfinite().detach()
    finite &= x.detach().abs() < 1e18  # beyond, the formula's own x^2 overflows in float32
    info = torch.finfo(dtype)
    # Within one step of the dtype (below its normal numbers: within the smallest of them, since some bfloat16
    # instructions know no others), and for x far below zero within float32's rounding of 1 + tanh or 1 + erf. The
    # derivative crosses zero at -0.75, where a small part of one step of its terms remains.
    for got, expected, small in ((out, ref, 0.0), (x.grad, wide.grad, info.eps / 50)):
        got, expected, at = got.detach()[finite].double(), expected.detach()[finite], wide.detach()[finite]
        allowed = expected.abs() * info.eps + min(info.smallest_normal, 1e-7) + 3e-7 * at.abs().clamp(max=20) + small
        wrong = ~((got - expected).abs() <= allowed)
        assert not wrong.any(), f"x = {at[wrong][:5]}: {got[wrong][:5]}, expected {expected[wrong][:5]}"


def test_gelu_of_huge_numbers(kernel: str) -> None:
    for approximate, huge in itertools.product(("tanh", "none"), (1e18, 1e20, 3e38)):
        x = torch.tensor([huge, -huge], requires_grad=True)
        out = ops.gelu(x, approximate=approximate, backend=kernel)
        out.sum().backward()
        assert x.grad is not None
        assert out.tolist() == [x[0], 0.0]
        assert x.grad.tolist() == [1.0, 0.0]


def test_zero_keeps_its_sign(backend: str) -> None:
    for approximate in ("tanh", "none"):
        out = ops.gelu(torch.tensor([0.0, -0.0]), approximate=approximate, backend=backend)
        assert out.signbit().tolist() == [False, True]
