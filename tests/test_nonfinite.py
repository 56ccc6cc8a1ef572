"""NaN, infinities and overflow: which results they reach, the same on every backend; and tensors without heads."""

from __future__ import annotations

import math

import pytest
import torch
from grid import DTYPES, F32, leaves, randn
from test_attention import Attention
from torch import Tensor

from gptcore import ops

MASKS = [
    Attention(lengths=(150, 150)),
    Attention(lengths=(150, 150), causal=False, window=(70, 3)),
    Attention(lengths=(150, 150), causal=False, documents=((30, 31, 60, 29),) * 2),
    Attention(lengths=(40, 150), documents=((10, 0, 30), (70, 50, 30))),
]
IDS = ["causal", "window", "documents", "cross"]


def assert_same(name: str, got: Tensor, clean: Tensor, reached: Tensor) -> None:
    """Rows that are not reached do not change, except that a GPU rescales the rows of a warp together."""
    torch.testing.assert_close(got[~reached], clean[~reached], rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKS, ids=IDS)
def test_a_bad_value_reaches_exactly_the_queries_that_attend_to_it(
    backend: str, case: Attention, dtype: torch.dtype
) -> None:
    if backend == "simt":
        pytest.xfail("the CUDA kernels multiply masked weights of 0 by NaN")
    query_len, kv_len = case.lengths
    q, k, v = (randn(1, 1, n, 40, seed=s, dtype=dtype) for s, n in enumerate((query_len, kv_len, kv_len)))
    seen = case.seen()[0, 0]
    clean = ops.attention(q, k, v, **case.settings(), backend=backend)
    for at, column, bad in ((1, 0, math.inf), (65, 39, math.nan), (kv_len - 1, 17, -math.inf)):
        v[0, 0, at, column] = bad
    out = ops.attention(q, k, v, **case.settings(), backend=backend)
    for at, column in ((1, 0), (65, 39), (kv_len - 1, 17)):
        assert torch.equal(~out[0, 0, :, column].isfinite(), seen[:, at])
        clean[0, 0, seen[:, at], column] = out[0, 0, seen[:, at], column] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("case", MASKS, ids=IDS)
def test_a_bad_row_reaches_only_the_gradients_of_what_attends_to_it(kernel: str, case: Attention, which: int) -> None:
    """The gradients of the torch backend are PyTorch's: a product with a weight of zero keeps a NaN."""
    if kernel == "simt":
        pytest.xfail("the CUDA kernels multiply masked weights of 0 by NaN")
    query_len, kv_len = case.lengths
    tensors = [randn(1, 2, n, 24, seed=s) for s, n in enumerate((query_len, kv_len, kv_len, query_len))]
    seen, at = case.seen()[0, 0], tensors[which].shape[2] // 4
    results = []
    for bad in (None, math.nan, math.inf):
        if bad is not None:
            tensors[which][0, 0, at, 5] = bad
        q, k, v = leaves(*tensors[:3])
        out = ops.attention(q, k, v, **case.settings(), backend=kernel)
        results.append(torch.autograd.grad(out, (q, k, v), tensors[3]))
    queries = torch.arange(query_len) == at if which in (0, 3) else seen[:, at]
    keys = seen[queries].any(0)
    for found in results[1:]:
        for name, got, clean, reached in zip(("dq", "dk", "dv"), found, results[0], (queries, keys, keys), strict=True):
            assert_same(name, got[0, 0], clean[0, 0], reached)
            assert torch.equal(got[0, 1], clean[0, 1]), f"{name}: another head changed"
    dq, dk, dv = results[1]
    assert not dq[0, 0, queries].isfinite().any(-1).all() or which == 3
    assert not (dv if which == 3 else dk)[0, 0, keys].isfinite().all(), "a NaN was lost"


def test_queries_without_heads(backend: str) -> None:
    for query_len in (0, 5):
        q, k, v = leaves(torch.zeros(2, 0, query_len, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 8, seed=1))
        out, lse = ops.attention_with_lse(q, k, v, backend=backend)
        assert (out.shape, lse.shape) == ((2, 0, query_len, 8), (2, 0, query_len))
        dq, dk, dv = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), allow_unused=True)
        assert not any(grad.any() for grad in (dq, dk, dv) if grad is not None)


@pytest.mark.parametrize("width", [3, 64, 1000, 16384])
def test_layer_norm_that_overflows_is_nan(backend: str, width: int) -> None:
    """Where the sum of the squares of x - mean is beyond float32; below that the result is right."""
    weight, bias = randn(width, seed=1), randn(width, seed=2)
    for magnitude in (1e16, 1e19, 1e20, 1e25, 3e37):
        x = randn(4, width, scale=magnitude)
        out = ops.layer_norm(x, weight, bias, backend=backend)
        wide = x.double() - x.double().mean(-1, keepdim=True)
        overflows = wide.square().sum(-1) > torch.finfo(F32).max
        right = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias
        assert torch.equal(out.isnan().all(-1), overflows)
        torch.testing.assert_close(out[~overflows], right[~overflows].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_of_infinity(backend: str, approximate: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([-math.inf, -largest, largest, math.inf, math.nan], dtype=dtype, requires_grad=True)
    out = ops.gelu(x, approximate=approximate, backend=backend)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out[:4].tolist() == [0.0, 0.0, largest, math.inf]
    assert grad[:4].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert out[4].isnan()
    assert grad[4].isnan()
