"""ops.attention against its formula in float64, by the rule of grid.py, and its edges."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid import BF16, DTYPES, F16, F32, F64, ON_GPU, SLOW, covering, errors, judge, leaves, over, randn, there, threads
from torch import Tensor

from gptcore import ops
from gptcore.ops import native
from gptcore.ops.attention import Settings


@dataclass(frozen=True)
class Attention:
    lengths: tuple[int, int] = (65, 65)
    head_dim: int = 16
    heads: tuple[int, int] = (2, 2)
    batch: int = 1
    causal: bool = True
    window: tuple[int, int] | None = None
    scale: float | None = None
    documents: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # lengths of their queries and of their keys
    dropout_p: float = 0.0
    magnitude: float = 1.0  # of queries
    dtype: torch.dtype = F32

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v, the incoming gradients of out and of the log-sum-exp."""
        (query_len, kv_len), (heads, kv_heads) = self.lengths, self.heads
        q = randn(self.batch, heads, query_len, self.head_dim, seed=1, scale=self.magnitude, dtype=self.dtype)
        k, v = (randn(self.batch, kv_heads, kv_len, self.head_dim, seed=s, dtype=self.dtype) for s in (2, 3))
        grad_out = randn(self.batch, heads, query_len, self.head_dim, seed=4, dtype=self.dtype)
        return q, k, v, grad_out, randn(self.batch, heads, query_len, seed=5)

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {name: getattr(self, name) for name in ("causal", "window", "scale", "dropout_p")}
        if self.documents is not None:
            q, k = (torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in self.documents)
            settings["cu_seqlens"] = (q, k.int()) if self.documents[0] != self.documents[1] else q.int()
        return settings

    def seen(self) -> Tensor:
        """(batch, 1, query_len, kv_len): which keys each query attends to, by enumerating the ranges."""
        (query_len, kv_len), (left, right) = self.lengths, self.window or (-1, -1)
        seen = np.zeros((self.batch, query_len, kv_len), dtype=bool)
        q_at = k_at = 0
        for q_count, k_count in zip(
            *(self.documents or ((query_len,) * self.batch, (kv_len,) * self.batch)), strict=True
        ):
            for i in range(q_count):
                position = i + k_count - q_count
                first = max(0, position - left) if left >= 0 else 0
                last = min(
                    k_count - 1, position if self.causal else k_count, position + right if right >= 0 else k_count
                )
                if first <= last:
                    begin = k_at % kv_len + first
                    seen[q_at // query_len, (q_at + i) % query_len, begin : begin + last + 1 - first] = True
            q_at, k_at = q_at + q_count, k_at + k_count
        return torch.from_numpy(seen)[:, None]

    def factor(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def kept(self) -> Tensor:
        """(batch, heads, query_len, kv_len): what is left of each weight, for the seed drawn after manual_seed(0)."""
        torch.manual_seed(0)
        seed = int(torch.randint(2**63 - 1, (1,)))
        batch_head, query, key = np.indices((self.batch * self.heads[0], *self.lengths))
        words = np.stack(philox((key // 4, query, batch_head, 0 * key), seed), axis=-1)
        word = np.take_along_axis(words, (key % 4)[..., None], axis=-1)[..., 0]
        kept = torch.from_numpy(word >= int(self.dropout_p * 2**32)).view(self.batch, self.heads[0], *self.lengths)
        return kept.double() / (1 - self.dropout_p)


def philox(counter: tuple[Any, ...], key: int) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 as in the paper (Salmon et al. 2011, section 3.3), on arrays of 32-bit words held in uint64."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def attention_formula(case: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that are seen, and the log of its denominator; in the dtype of q."""
    head = torch.arange(case.heads[0]) // (case.heads[0] // case.heads[1])
    seen = case.seen()
    if case.lengths[1] == 0:
        return q * 0 + 0 * (k + v).sum(), q.sum(-1) * 0 - math.inf
    scores = (case.factor() * (q @ k[:, head].mT)).masked_fill(~seen, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    blind = ~seen.any(-1, keepdim=True)
    weights = weights / total.masked_fill(blind, 1.0)
    lse = (largest + total.masked_fill(blind, 1.0).log()).masked_fill(blind, -math.inf)[..., 0]
    if case.dropout_p:
        weights = weights * case.kept().to(weights.dtype)
    return weights @ v[:, head], lse


def attention_theirs(case: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own: it has no attention that returns a log-sum-exp, nor one whose dropout can be prescribed."""
    if case.dropout_p or 0 in case.lengths or case.batch == 0:
        return attention_formula(case, q, k, v)
    head = torch.arange(case.heads[0]) // (case.heads[0] // case.heads[1])
    k, v, seen = k[:, head], v[:, head], case.seen()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=case.factor())
    scores = (case.factor() * (q.float() @ k.float().mT)).masked_fill(~seen, -math.inf)
    return out, torch.logsumexp(scores, dim=-1)


def attention_results(
    run: Callable[..., tuple[Tensor, Tensor]], case: Attention, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, and the gradients from both outputs at once."""
    q, k, v, grad_out, grad_lse = case.inputs()
    q, k, v = leaves(q, k, v, dtype=dtype)
    torch.manual_seed(0)
    out, lse = run(q, k, v)
    # An infinite log-sum-exp is a constant; its incoming gradient must not matter.
    torch.autograd.backward([out, lse], [grad_out.to(out.dtype), grad_lse.to(lse.dtype)])
    return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@functools.cache
def attention_expected(case: Attention) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ref = attention_results(functools.partial(attention_formula, case), case, F64)
    theirs = attention_results(functools.partial(attention_theirs, case), case, case.dtype)
    return ref, theirs


def check_attention(case: Attention, backend: str) -> None:
    condition, roundings = {}, 1
    if backend not in ("cpu", "torch"):
        # A GPU's kernels sum S, dP and delta over head_dim one term after the other: head_dim roundings of partial sums
        # of up to sqrt(head_dim), where PyTorch sums in parts: the wider a processor's vectors, the more of them. And P
        # and dS are rounded for the tensor cores, as in PyTorch on a GPU, but not on the CPU, with which they are
        # compared.
        root = math.sqrt(case.head_dim)
        condition = {"dq": root, "dk": root, "out": root / 4, "dv": root / 4}
        roundings = 2 if case.dtype != F32 else 1
    # Where scores are in the thousands a softmax is a maximum, and which of two keys that nearly tie has it, the last
    # bit of a score decides: the largest error is luck, ours and PyTorch's. So is the error of a few scores. Of such
    # cases medians over draws are compared, which are one batch.
    batch = case.batch
    if case.magnitude >= 1e3 or 0 < batch * case.heads[0] * math.prod(case.lengths) <= 64:
        case = replace(case, batch=(25 if backend in ("cpu", "torch", *ON_GPU) else 9) * batch)
    got = attention_results(there(ops.attention_with_lse, backend, **case.settings()), case, case.dtype)
    assert got["out"].dtype == case.dtype
    assert got["lse"].dtype == F32
    ref, theirs = attention_expected(case)
    for name in ref:
        draws = zip(*(results[name].split(max(1, batch)) for results in (got, ref, theirs)), strict=True)
        allowance = condition.get(name, 0.0), roundings
        judge(name, [errors(name, *draw, *allowance) for draw in draws])


# Queries come in panels of 8, 16 or 64 and keys in blocks of 64; products in tiles of 6 rows and vectors of 4, 8 or 16.
LENGTHS = [
    (1, 1), (2, 2), (13, 13), (63, 64), (64, 64), (65, 63), (65, 130), (128, 128), (129, 127), (127, 129),
    (1, 130), (130, 1), (7, 193), (16, 66),
]  # fmt: skip
MASKS = [
    (True, None),
    (False, None),
    (True, (3, 0)),
    (False, (0, 0)),
    (False, (-1, 2)),
    (False, (66, 5)),
    (True, (64, -1)),
]
GRID = [
    Attention(causal=mask[0], window=mask[1], **axes)
    for axes in covering(
        head_dim=[1, 2, 3, 8, 13, 16, 17, 32, 64, 80, 96, 100, 128, 192, 255, 256],
        lengths=LENGTHS,
        mask=MASKS,
        heads=[(1, 1), (2, 1), (6, 2), (3, 3)],
        dtype=list(DTYPES),
        batch=[1, 2],
        scale=[None, -0.3, 0.0, 2.0],
    )
    for mask in [axes.pop("mask")]
]
SAME = [
    (10, 30, 25), (65,), (1,) * 65, (0, 64, 0, 1, 0), (33, 32, 33, 32), (0, 65, 0, 0, 5, 60, 0),
]  # fmt: skip
PAIRS = [
    ((10, 30, 25), (60, 5, 65)),
    ((0, 65), (129, 1)),
    ((64, 1), (0, 130)),
    ((33, 0, 32, 1, 64), (130, 0, 0, 66, 64)),
]
GRID += [
    Attention(
        lengths=(65, sum(documents[1]) // max(1, sum(documents[0]) // 65)),
        batch=sum(documents[0]) // 65, documents=documents, causal=mask[0], window=mask[1], **axes,
    )
    for axes in covering(
        documents=[*((lengths, lengths) for lengths in SAME), *PAIRS],
        mask=MASKS,
        dtype=list(DTYPES),
        heads=[(2, 1), (3, 3)],
        head_dim=[5, 64],
    )
    for documents, mask in [(axes.pop("documents"), axes.pop("mask"))]
]  # fmt: skip
GRID += [
    Attention(lengths=(66, 131), dropout_p=p, dtype=dtype, heads=heads, causal=causal, documents=documents, batch=batch)
    for p, dtype, heads, causal, documents, batch in [
        (0.1, F32, (2, 2), True, None, 2),
        (0.5, BF16, (4, 2), False, None, 1),
        (0.9, F16, (1, 1), True, None, 1),
        (0.3, BF16, (2, 1), True, ((30, 36, 66), (70, 61, 131)), 2),
        (0.3, F32, (2, 1), True, ((30, 36), (70, 61)), 1),
    ]
]
GRID += [  # the ends of the range: scores of 1e4 and of nothing at all
    Attention(magnitude=magnitude, dtype=dtype, causal=causal, head_dim=64)
    for magnitude in (1e4, 1e-5, 0.0)
    for dtype in DTYPES
    for causal in (True, False)
]
LARGE = [  # large scores: what is rounded must cancel, also if the scale is no power of two or the queries are few
    Attention(lengths=lengths, head_dim=head_dim, magnitude=magnitude)
    for lengths in [(65, 65), (1, 1), (1, 65), (3, 130)]
    for head_dim in (64, 80)
    for magnitude in (1e3, 1e4)
]
GRID += LARGE
GRID += [  # no keys, no queries
    Attention(lengths=lengths, batch=batch, dtype=dtype)
    for lengths, batch, dtype in [
        ((0, 0), 1, F32), ((0, 5), 2, BF16), ((5, 0), 2, F32), ((5, 0), 1, BF16), ((5, 5), 0, F32), ((0, 0), 0, F16)
    ]
]  # fmt: skip


# A GPU's tiles have 16 to 128 rows and 8 to 64 columns, and widths of 32, 64, 96, 128 and 256.
TILES = [
    Attention(causal=mask[0], window=mask[1], **axes)
    for axes in covering(
        head_dim=[1, 13, 31, 32, 33, 64, 65, 96, 100, 128, 130, 255, 256],
        lengths=[(1, 1), (15, 17), (16, 16), (65, 63), (64, 64), (63, 130), (129, 127), (1, 200), (130, 1), (33, 97)],
        mask=MASKS,
        heads=[(1, 1), (6, 2), (3, 3)],
        dtype=list(DTYPES),
        scale=[None, -0.3, 0.0, 2.0],
    )
    for mask in [axes.pop("mask")]
]
TILES += [case for case in GRID if case.documents and case.head_dim == 5][::3]
TILES += [Attention(lengths=(66, 131), head_dim=128, dropout_p=0.4, dtype=BF16, heads=(2, 1))]  # in pairs of warps
TILES += [case for case in GRID if case.dropout_p or 0 in (*case.lengths, case.batch)]
# Of 25 draws: with one head, since to these backends another is the same program run once more; and each head_dim with
# one of the magnitudes.
TILES += [
    replace(case, heads=(1, 1))
    for case in GRID
    if case.magnitude != 1.0 and (case not in LARGE or (case.head_dim == 80) == (case.magnitude == 1e4))
]


@over(GRID, TILES)
def test_attention(backend: str, case: Attention) -> None:
    check_attention(case, backend)


def check_a_key_with_all_the_weight(
    backend: str, lengths: tuple[int, int], head_dim: int, dtype: torch.dtype = F32
) -> None:
    """Not even a rounding error: it would be multiplied with the large queries and keys that make such a weight."""
    query_len, kv_len = lengths
    sizes = enumerate((query_len, kv_len, kv_len))
    q, k, v = leaves(*(randn(1, 2, n, head_dim, seed=n + s, dtype=dtype) for s, n in sizes))
    with torch.no_grad():
        q.abs_().add_(1.0)
        k.abs_().add_(1.0).mul_(-1e3)
        k[:, :, -1] *= -1
    out = ops.attention(q, k, v, causal=False, backend=backend)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), randn(*out.shape, seed=4, dtype=dtype))
    assert torch.equal(out, v[:, :, -1:].expand_as(out))
    assert not dq.any()
    assert not dk.any()
    assert dv[:, :, -1].all() if dtype == F32 else dv[:, :, -1].any(-1).all()  # few bits may cancel


@pytest.mark.parametrize("head_dim", [3, 64, 80, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (3, 130), (65, 130)])
def test_a_key_with_all_the_weight_has_no_gradient(backend: str, lengths: tuple[int, int], head_dim: int) -> None:
    check_a_key_with_all_the_weight(backend, lengths, head_dim)
    if backend == "cpu":  # on a GPU delta is a plain sum, for dS is rounded by more
        check_a_key_with_all_the_weight(backend, lengths, head_dim, BF16)


PACKED = [
    {},
    {"causal": False, "scale": -0.3},
    {"window": (9, 0), "dropout_p": 0.25},
    {"cu_seqlens": torch.tensor([0, 30, 67, 90, 134])},
]


def check_packed(backend: str, settings: dict[str, Any], dtype: torch.dtype = F32) -> None:
    (qkv,) = leaves(randn(2, 67, 3, 2, 24, dtype=dtype))
    results = []
    for run in (
        lambda: ops.attention_qkvpacked(qkv, **settings, backend=backend),
        lambda: ops.attention(*qkv.permute(2, 0, 3, 1, 4), **settings, backend=backend).transpose(1, 2),
    ):
        torch.manual_seed(0)
        out = run()
        results.append((out, *torch.autograd.grad(out, qkv, randn(*out.shape, seed=1, dtype=dtype))))
    for packed, apart in zip(*results, strict=True):
        assert torch.equal(packed, apart)
    assert results[0][0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", PACKED, ids=["causal", "full", "window", "documents"])
def test_packed_is_the_same(backend: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    check_packed(backend, settings, dtype)


def test_packed_refuses_what_is_not(backend: str) -> None:
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 9, 48\), expected \(batch, length, 3, heads, head_dim\)"):
        ops.attention_qkvpacked(torch.zeros(2, 9, 48), backend=backend)
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 9, 2, 3, 8\), expected"):
        ops.attention_qkvpacked(torch.zeros(2, 9, 2, 3, 8), backend=backend)
    with pytest.raises(TypeError, match=r"qkv is a list, expected a torch\.Tensor"):
        ops.attention_qkvpacked([1.0], backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"qkv is torch\.int64 with 1 heads, expected a floating-point dtype"):
        ops.attention_qkvpacked(torch.zeros(1, 2, 3, 1, 8).long(), backend=backend)
    with pytest.raises(ValueError, match=r"qkv is torch\.float32 with 0 heads, expected"):
        ops.attention_qkvpacked(torch.zeros(1, 2, 3, 0, 8), backend=backend)
    with pytest.raises(ValueError, match=r"qkv has stride 2 in its last dimension, expected 1"):
        ops.attention_qkvpacked(torch.zeros(1, 2, 3, 1, 16)[..., ::2], backend=backend)
    with pytest.raises(ValueError, match=r"head_dim is 257, expected 1 to 256"):
        ops.attention_qkvpacked(torch.zeros(1, 2, 3, 1, 257), backend=backend)
    with pytest.raises(ValueError, match="dropout_p is 1, expected 0 <="):
        ops.attention_qkvpacked(torch.zeros(1, 2, 3, 1, 8), dropout_p=1, backend=backend)


@pytest.mark.parametrize("backend", [name for name in SLOW if name == "simt"], indirect=True)
@pytest.mark.parametrize("head_dim", [24, 64, 100, 200])
@pytest.mark.parametrize("lengths", [(65, 65), (1, 130), (33, 97)])
def test_attention_in_tf32(backend: str, lengths: tuple[int, int], head_dim: int) -> None:
    """Operands of 11 bits: a score's error is that of so many products, and so is its exponential's relative error."""
    case = Attention(lengths=lengths, head_dim=head_dim, heads=(4, 2), batch=2)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        got = attention_results(functools.partial(ops.attention_with_lse, backend=backend), case, F32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    ref, theirs = attention_expected(case)
    for name in ref:
        error = float((got[name] - ref[name]).norm() / ref[name].norm())
        assert error <= 2**-9 * (1 + case.factor() * math.sqrt(head_dim)), f"{name}: error {error:.3g}"
    if lengths[0] > 1:
        assert not torch.allclose(got["out"], theirs["out"], rtol=1e-5, atol=1e-6), "these are float32 products"


def test_philox_gives_the_words_that_its_authors_publish() -> None:
    # Random123's known answers for philox4x32-10
    assert [int(w) for w in philox((0, 0, 0, 0), 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = philox(pi, 0x299F31D0_A4093822)
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


KEYS = 101  # more than a block, and not a multiple of the four words that Philox returns


def dropped(backend: str, p: float, seed: int, dtype: torch.dtype = F32) -> Tensor:
    """The weights after dropout: with an identity as values, they are the output."""
    torch.manual_seed(seed)
    q, k = torch.zeros(3, 2, 130, KEYS, dtype=dtype), torch.zeros(3, 2, KEYS, KEYS, dtype=dtype)
    v = torch.eye(KEYS, dtype=dtype).expand(3, 2, KEYS, KEYS)
    return ops.attention(q, k, v, causal=False, dropout_p=p, backend=backend)


@pytest.mark.slow
def test_dropout_drops_the_same_everywhere_at_the_rate_asked_for(backend: str) -> None:
    for p in (0.1, 0.75):
        weights = dropped(backend, p, seed=7)
        assert abs(float((weights == 0).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / weights.numel())
        kept = weights[weights > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / KEYS / (1 - p)))
        assert torch.equal(weights == 0, dropped("torch", p, seed=7) == 0)
        assert torch.equal(weights == 0, dropped(backend, p, seed=7, dtype=BF16) == 0)
        assert not torch.equal(weights == 0, dropped(backend, p, seed=8) == 0)
        for axis in range(3):  # no batch, head or query repeats another
            assert not torch.equal(weights.select(axis, 0) == 0, weights.select(axis, 1) == 0)


def test_dropout_draws_anew_for_each_call(backend: str) -> None:
    q = randn(1, 2, 64, 16)
    torch.manual_seed(0)
    first, second = (ops.attention(q, q, q, dropout_p=0.5, backend=backend) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, ops.attention(q, q, q, dropout_p=0.5, backend=backend))


def test_a_limit_beyond_every_key_is_no_limit(backend: str) -> None:
    q, k, v = (randn(1, 2, n, 8, seed=n) for n in (20, 9, 9))
    for causal in (True, False):
        free = ops.attention(q, k, v, causal=causal, backend=backend)
        for limit in (30, 2**31 - 1, 2**31, 2**63 - 1, 2**70):
            assert torch.equal(free, ops.attention(q, k, v, causal=causal, window=(limit, limit), backend=backend))


def test_the_gradient_of_the_log_sum_exp_alone(backend: str) -> None:
    case = Attention(lengths=(65, 70), heads=(4, 2), window=(20, 0))
    q, k, v = leaves(*case.inputs()[:3])
    ops.attention_with_lse(q, k, v, **case.settings(), backend=backend)[1].square().sum().backward()
    ref = leaves(*case.inputs()[:3], dtype=F64)
    attention_formula(case, *ref)[1].square().sum().backward()
    for ours, theirs in zip((q, k), ref, strict=False):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=2e-5, atol=2e-5)
    assert v.grad is None or not v.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_number_stays_with_those_who_see_it(backend: str, dtype: torch.dtype) -> None:
    inputs = [randn(2, 2, 130, 16, seed=s, dtype=dtype) for s in range(3)]
    clean = ops.attention(*inputs, backend=backend)
    for bad in (math.nan, math.inf, -math.inf):
        for which, at in itertools.product(range(3), (0, 40, 129)):
            tensors = [tensor.clone() for tensor in inputs]
            tensors[which][1, 0, at, 3] = bad
            out = ops.attention(*tensors, backend=backend)
            same = (out == clean).all(-1)  # (B, H, T)
            assert same[0].all(), "another batch row changed"
            assert same[1, 1].all(), "another head changed"
            if which == 0:
                assert same[1, 0, torch.arange(130) != at].all(), "another query changed"
            if which == 1:
                assert same[1, 0, :at].all(), "a query before the key changed"
            seeing = torch.arange(130) == at if which == 0 else torch.arange(130) >= at
            if bad != bad:
                assert out[1, 0, seeing].isnan().any(-1).all(), "a NaN was lost"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(128, 96), (130, 97), (65, 17)])
def test_queries_that_see_nothing_beside_some_that_do(
    backend: str, lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    """A whole number of vectors and tiles of them, after a head that left NaN in the scratch memory."""
    query_len, kv_len = lengths
    q, k, v = (randn(2, 1, n, 64, seed=s, dtype=dtype) for s, n in enumerate((query_len, kv_len, kv_len)))
    v[1] = math.nan  # the last of its rows comes first
    out = ops.attention(q, k, v, backend=backend)
    assert not out[0, :, : query_len - kv_len].any()
    assert not out[0].isnan().any()
    assert torch.equal(out[0], ops.attention(q[:1], k[:1], v[:1], backend=backend)[0])


def poisoned(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output inside a larger tensor full of NaN, and what lies around it."""
    around = torch.full((*shape[:-1], shape[-1] + 24), math.nan, dtype=dtype)
    return around[..., 8:-16], around


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 100])
def test_attention_writes_every_element_and_nothing_else(compiled: str, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v, grad_out = (randn(2, 2, n, head_dim, seed=s, dtype=dtype) for s, n in enumerate((67, 45, 45, 67)))
    (out, around_out), lse = poisoned(*q.shape, dtype=dtype), torch.full(q.shape[:3], math.nan)
    with threads(2):
        settings = Settings(scale=0.3), native.execution(compiled, q)
    module = native.module(compiled)
    module.attention_forward(q, k, v, out, lse, *settings)
    gradients, around = zip(*(poisoned(*t.shape, dtype=dtype) for t in (q, k, v)), strict=True)
    module.attention_backward(grad_out, None, q, k, v, out, lse, *gradients, *settings)
    assert not lse.isnan().any()
    for inner, outer in zip((out, *gradients), (around_out, *around), strict=True):
        assert not inner.isnan().any()
        assert outer[..., :8].isnan().all()
        assert outer[..., -16:].isnan().all()
