"""NaN, infinities and overflow: which results they reach, the same on every backend; and tensors without heads."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from grid import BF16, DTYPES, F16, F32, leaves, name_of, randn
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
    """Rows that are not reached do not change, except that a GPU rescales the rows of a warp together, or sums again.

    A sum again rounds otherwise: weights are not rounded to 16 bits.
    """
    tolerance = max(1e-5, 2 * torch.finfo(got.dtype).eps)
    torch.testing.assert_close(
        got[~reached], clean[~reached], rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKS, ids=IDS)
def test_a_bad_value_reaches_exactly_the_queries_that_attend_to_it(
    backend: str, case: Attention, dtype: torch.dtype
) -> None:
    query_len, kv_len = case.lengths
    q, k, v = (randn(1, 1, n, 40, seed=s, dtype=dtype) for s, n in enumerate((query_len, kv_len, kv_len)))
    reached = torch.zeros(query_len, 40, dtype=torch.bool)
    clean = ops.attention(q, k, v, **case.settings(), backend=backend)
    for at, column, bad in ((1, 0, math.inf), (65, 39, math.nan), (kv_len - 1, 17, -math.inf)):
        v[0, 0, at, column] = bad
        reached[:, column] = case.seen()[0, 0, :, at]
    out = ops.attention(q, k, v, **case.settings(), backend=backend)
    assert torch.equal(~out[0, 0].isfinite(), reached)
    same = ~reached
    if backend in ("simt", "triton"):  # these sum the other elements of a column again
        assert_same("out", out[0, 0], clean[0, 0], reached)
        same &= ~reached.any(0)
    assert torch.equal(out[0, 0, same], clean[0, 0, same])


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("case", MASKS, ids=IDS)
def test_a_bad_row_reaches_only_the_gradients_of_what_attends_to_it(backend: str, case: Attention, which: int) -> None:
    query_len, kv_len = case.lengths
    tensors = [randn(1, 2, n, 24, seed=s) for s, n in enumerate((query_len, kv_len, kv_len, query_len))]
    seen, at = case.seen()[0, 0], tensors[which].shape[2] // 4
    results = []
    for bad in (None, math.nan, math.inf):
        if bad is not None:
            tensors[which][0, 0, at, 5] = bad
        q, k, v = leaves(*tensors[:3])
        out = ops.attention(q, k, v, **case.settings(), backend=backend)
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


CROSS = Attention(lengths=(40, 50), documents=((10, 0, 30), (20, 3, 27)))
SUMMED_AGAIN = [
    Attention(lengths=(37, 40), heads=(4, 2), batch=2, scale=-0.2, head_dim=80, dtype=F16, dropout_p=0.25),
    Attention(lengths=(37, 40), heads=(3, 3), causal=False, window=(9, 20), head_dim=33, dropout_p=0.25),
    dataclasses.replace(CROSS, head_dim=128, scale=-0.1),
    dataclasses.replace(CROSS, head_dim=256, dtype=BF16),
    Attention(lengths=(3, 700), heads=(4, 2), window=(232, 0), head_dim=40, dropout_p=0.25),  # split among blocks
]


@pytest.mark.parametrize("case", SUMMED_AGAIN, ids=name_of)
def test_a_bad_row_reaches_only_what_attends_to_it(backend: str, case: Attention) -> None:
    check_reach(backend, case)


def check_reach(backend: str, case: Attention) -> None:
    """A NaN in a row of one of the inputs reaches only the results of rows that attend to it, in one head."""
    seen, tensors = case.seen()[-1, 0], case.inputs()[:4]
    names, (heads, kv_heads) = ("out", "dq", "dk", "dv"), case.heads
    clean = None
    for which in (None, 0, 1, 2, 3):
        inputs = [tensor.clone() for tensor in tensors]
        if which is not None:
            at = 2 * inputs[which].shape[2] // 3
            inputs[which][-1, -1, at, 5] = math.nan
        q, k, v = leaves(*inputs[:3])
        torch.manual_seed(0)
        out = ops.attention(q, k, v, **case.settings(), backend=backend)
        found = (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3]))
        if clean is None:
            clean = found
            continue
        queries = torch.zeros(case.batch, heads, case.lengths[0], dtype=torch.bool)
        if which in (0, 3):
            queries[-1, -1, at] = True
        else:
            queries[-1, -heads // kv_heads :] = seen[:, at]
        keys = torch.zeros(case.batch, kv_heads, case.lengths[1], dtype=torch.bool)
        keys[-1, -1] = seen[queries[-1].any(0)].any(0)
        assert queries.any()
        for name, got, before, reached in zip(names, found, clean, (queries, queries, keys, keys), strict=True):
            assert_same(f"{name} with NaN in {'qkvg'[which]}", got, before, reached)
            independent = (which, name) in ((3, "out"), (2, "dv"))
            if not independent and not (name == "dv" and case.dropout_p):  # which may drop a probability that is NaN
                assert torch.equal(~got.isfinite().all(-1), reached), f"{name} lost a NaN in {'qkvg'[which]}"


def test_a_weight_of_zero_keeps_a_nan(backend: str) -> None:
    """A probability that underflows to 0: 0 x NaN and 0 x inf are NaN, also where the keys are split among blocks."""
    k, v = randn(1, 1, 1100, 40), randn(1, 1, 1100, 40, seed=1)
    k[0, 0, 600] = -k[0, 0, 5]
    v[0, 0, 600, 3], v[0, 0, 600, 4] = math.inf, math.nan
    for query_len in (1, 20):
        q = (200 * k[0, 0, 5]).expand(1, 1, query_len, 40)
        out = ops.attention(q, k, v, backend=backend)
        assert (~out.isfinite()).nonzero()[:, 3].tolist() == [3, 4] * query_len


def test_a_document_of_infinite_scores_hides_the_others(backend: str) -> None:
    q, k, v = (randn(1, 1, 20, 8, seed=s) for s in range(3))
    q[0, 0, :, 0], k[0, 0, 10:, 0] = 1.0, -math.inf
    outs = []
    for number in (0.0, math.nan):
        v[0, 0, 4, 2] = number
        outs.append(ops.attention(q, k, v, cu_seqlens=torch.tensor([0, 10, 20]), backend=backend)[:, :, 10:])
    torch.testing.assert_close(*outs, equal_nan=True, rtol=0, atol=0)


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
