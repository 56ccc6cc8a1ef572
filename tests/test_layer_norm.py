"""ops.layer_norm against its formula in float64, by the rule of grid.py, and its edges."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import BF16, DTYPES, F16, F32, F64, check, covering, leaves, over, randn, there
from torch import Tensor

from gptcore import ops


@dataclass(frozen=True)
class LayerNorm:
    width: int = 64
    rows: int = 5
    data: str = "normal"
    bias: bool = True
    residual: str | None = None  # None, "same" dtype as x, or "float32"
    parameters: str = "float32"  # or the "same" dtype as x
    out: torch.dtype | None = None
    eps: float = 1e-5
    dtype: torch.dtype = F32

    def inputs(self) -> list[Tensor | None]:
        """x, weight, bias, residual."""
        scale, shift = {
            "normal": (1, 0),
            "shifted": (1, 100),
            "constant": (0, 3.7),
            "tiny": (1e-4, 0),
            "large": (1e4, 0),
        }[self.data]
        dtypes = {"float32": F32, "same": self.dtype}
        return [
            randn(self.rows, self.width, scale=scale, shift=shift, dtype=self.dtype),
            randn(self.width, seed=1, shift=1.0, dtype=dtypes[self.parameters]),
            randn(self.width, seed=2, dtype=dtypes[self.parameters]) if self.bias else None,
            randn(self.rows, self.width, seed=3, scale=scale, dtype=dtypes[self.residual]) if self.residual else None,
        ]


def layer_norm_formula(
    case: LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    total = x if residual is None else x + residual
    mean = total.sum(-1, keepdim=True) / case.width
    variance = ((total - mean) ** 2).sum(-1, keepdim=True) / case.width
    out = (total - mean) / (variance + case.eps) ** 0.5 * weight
    return out if bias is None else out + bias, None if residual is None else total


def layer_norm_theirs(
    case: LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    total = x if residual is None else x + residual
    weight, bias = weight.to(total.dtype), None if bias is None else bias.to(total.dtype)
    return F.layer_norm(total, (case.width,), weight, bias, case.eps), None if residual is None else total


def layer_norm_results(run: Callable[..., Any], case: LayerNorm, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    x, weight, bias, residual = inputs = leaves(*case.inputs(), dtype=dtype)
    result = run(x, weight, bias, residual)
    out, residual_out = result if isinstance(result, tuple) else (result, None)
    outputs = {"out": out} if residual_out is None else {"out": out, "residual_out": residual_out}
    stored = F32 if case.residual == "float32" else case.dtype  # the formula in float64 gets the rounded gradients too
    torch.autograd.backward(
        list(outputs.values()),
        [randn(case.rows, case.width, seed=4 + i, dtype=stored).to(t.dtype) for i, t in enumerate(outputs.values())],
    )
    names = ("dx", "dweight", "dbias", "dresidual")
    gradients = {name: t.grad for name, t in zip(names, inputs, strict=True) if t is not None}
    return {name: t.detach() for name, t in (outputs | gradients).items()}


@functools.cache
def layer_norm_expected(case: LayerNorm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        layer_norm_results(functools.partial(layer_norm_formula, case), case, F64),
        layer_norm_results(functools.partial(layer_norm_theirs, case), case),
    )


LAYER_NORMS = [
    LayerNorm(**axes)
    for axes in covering(
        width=[1, 2, 7, 15, 16, 17, 63, 64, 65, 127, 768, 1000, 4096],
        rows=[1, 2, 65, 130],
        data=["normal", "shifted", "constant", "tiny", "large"],
        dtype=list(DTYPES),
        bias=[True, False],
        residual=[None, "same", "float32"],
        parameters=["float32", "same"],
    )
    if not (axes["data"] == "large" and axes["dtype"] == F16)  # sums beyond 65504
]
LAYER_NORMS += [LayerNorm(width=65536, rows=2, dtype=dtype, residual=r) for dtype in DTYPES for r in (None, "float32")]
LAYER_NORMS += [LayerNorm(width=1 << 20, rows=1)]
LAYER_NORMS += [LayerNorm(width=48, rows=rows, data="shifted") for rows in (0, 2100)]
LAYER_NORMS += [LayerNorm(width=width, data="constant") for width in (1000, 4096, 65536)]  # sums drift
LAYER_NORMS += [LayerNorm(eps=eps) for eps in (0.0, 1e-12, 1.0)]
LAYER_NORMS += [LayerNorm(width=8, rows=1800, dtype=BF16, residual=r, parameters="same") for r in (None, "same")]
FEW = [case for case in LAYER_NORMS if case.rows * case.width < 20_000 or case.width == 65536]


@over(LAYER_NORMS, FEW)
def test_layer_norm(backend: str, case: LayerNorm) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str) -> Any:
        return ops.layer_norm(x, weight, bias, eps=case.eps, residual=residual, backend=backend)

    got = layer_norm_results(there(run, backend), case)
    wide = torch.promote_types(case.dtype, F32 if case.residual == "float32" else case.dtype)
    assert got["out"].dtype == wide
    ref, theirs = layer_norm_expected(case)
    for name in ref:
        check(name, got[name], ref[name], theirs[name])


IN_16_BITS = [
    LayerNorm(rows=65, out=BF16),
    LayerNorm(width=7, out=F16),
    LayerNorm(width=48, rows=9, dtype=F16, residual="float32", out=F16),
    LayerNorm(width=50, dtype=BF16, residual="float32", bias=False, out=BF16),
    LayerNorm(width=16, residual="float32", out=BF16),
    LayerNorm(width=12304, rows=2, dtype=BF16, residual="float32", out=BF16),
    LayerNorm(width=12301, rows=2, out=F16),
]


@over(IN_16_BITS, IN_16_BITS)
def test_out_in_16_bits_has_the_bits_of_a_cast(backend: str, case: LayerNorm) -> None:
    assert case.out is not None
    results = []
    for out_dtype in (case.out, None):

        def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str) -> Any:
            return ops.layer_norm(x, weight, bias, residual=residual, out_dtype=out_dtype, backend=backend)  # noqa: B023

        inputs = leaves(*case.inputs())
        result = there(run, backend)(*inputs)
        out, *total = result if isinstance(result, tuple) else [result]
        assert out.dtype == out_dtype or out_dtype is None
        outs = [out.to(case.out), *total]
        grads = [randn(*t.shape, seed=4 + i, dtype=t.dtype) for i, t in enumerate(outs)]
        results.append([*outs, *torch.autograd.grad(outs, [t for t in inputs if t is not None], grads)])
    for i, (ours, cast) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == cast.dtype
        assert torch.equal(ours, cast), f"result {i} differs by up to {(ours.double() - cast.double()).abs().max()}"


@pytest.mark.parametrize(
    ("dtype", "residual", "out_dtype", "expected"),
    [
        (F16, None, BF16, r"out_dtype is torch.bfloat16, expected torch.float16$"),
        (F16, F32, BF16, r"out_dtype is torch.bfloat16, expected torch.float16 or torch.float32"),
        (F32, None, F64, r"out_dtype is torch.float64, expected torch.bfloat16 or torch.float16 or torch.float32"),
        (F32, None, "bfloat16", r"out_dtype is 'bfloat16', expected a torch.dtype"),
    ],
)
def test_an_out_dtype_that_does_not_fit(dtype: Any, residual: Any, out_dtype: Any, expected: str) -> None:
    x = randn(3, 8, dtype=dtype)
    with pytest.raises((TypeError, ValueError), match=expected):
        ops.layer_norm(x, randn(8), residual=None if residual is None else x.to(residual), out_dtype=out_dtype)


def test_a_gradient_that_is_the_same_everywhere_moves_nothing(kernel: str) -> None:
    x = randn(3, 1000, shift=100.0).requires_grad_()
    ops.layer_norm(x, torch.ones(1000), backend=kernel).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6


def test_a_bad_row_stays_a_row(backend: str) -> None:
    x, weight, bias = randn(8, 100), randn(100, seed=1), randn(100, seed=2)
    clean = ops.layer_norm(x, weight, bias, backend=backend)
    for bad in (math.nan, math.inf):
        x[3, 17] = bad
        out = ops.layer_norm(x, weight, bias, backend=backend)
        others = torch.arange(8) != 3
        assert torch.equal(out[others], clean[others])
        assert out[3].isnan().any()
