"""The kernel grid: every operation x backend x dtype x shape against its formula in float64.

A result passes if its error is at most twice that of PyTorch's own operation in the same dtype, plus one rounding. The
formulas here are written down on their own and share nothing with gptcore.ops.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C, ops
from gptcore.ops import native, registry

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16)
# The argument `backend`, and for the CPU's kernels the instruction set. A new backend is one more line here.
BACKENDS = {"torch": ("torch", None), **{f"cpu-{isa}": ("cpu", isa) for isa in _C.supported_isas()}}
# A GPU's kernels on the CPU, in a model of a GPU. A case takes a thousand times as long there, so it runs a smaller
# grid, made for the edges of a GPU's tiles. test_triton.py does so in Triton's interpreter.
SLOW = ["simt"] if ops.backends()["simt"] is None else []
# On a GPU the grid runs whole; what tests memory and autograd here stays with tensors on the CPU.
ON_GPU = [name for name in ("cuda", "triton") if ops.backends()[name] is None and torch.cuda.is_available()]
BACKENDS |= {name: (name, None) for name in SLOW}
NATIVE = [name for name in BACKENDS if name != "torch"]  # those that have kernels, whose bits can be compared


@contextlib.contextmanager
def running(name: str) -> Iterator[str]:
    """The argument `backend` for a line of BACKENDS, with its instruction set in use."""
    argument, isa = BACKENDS.get(name, (name, None))
    before = _C.cpu_isa()
    if isa is not None:
        _C.use_cpu_isa(isa)
    yield argument
    _C.use_cpu_isa(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param) as argument:
        yield argument


@pytest.fixture(params=NATIVE)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param) as argument:
        yield argument


@pytest.fixture(params=NATIVE)
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those whose native functions can be called by themselves."""
    with running(request.param) as argument:
        yield argument


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


# ---- what a case is, and when a result is right ----------------------------------------------------------------------


def covering(**axes: list[Any]) -> list[dict[str, Any]]:
    """Few combinations, in which every value of every axis meets every value of every other axis at least once."""
    choose = random.Random(0)
    sizes = {axis: range(len(values)) for axis, values in axes.items()}
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(sizes, 2) for x in sizes[a] for y in sizes[b]}
    found = []
    while missing:
        wanted = dict(min(missing))
        candidates = [{axis: wanted.get(axis, choose.choice(sizes[axis])) for axis in sizes} for _ in range(8)]
        pairs = [set(itertools.combinations(candidate.items(), 2)) & missing for candidate in candidates]
        best = max(range(8), key=lambda i: len(pairs[i]))
        missing -= pairs[best]
        found.append({axis: axes[axis][i] for axis, i in candidates[best].items()})
    return found


def there(run: Callable[..., Any], backend: str, **settings: Any) -> Callable[..., Any]:
    """`run` with its tensors brought to the device of the backend, and what it returns brought back."""
    device = "cuda" if backend in ON_GPU else "cpu"

    def moved(value: Any) -> Any:
        return tuple(map(moved, value)) if isinstance(value, tuple) else getattr(value, "to", lambda _: value)(device)

    settings = {name: moved(value) for name, value in settings.items()}

    def call(*tensors: Any) -> Any:
        result = run(*map(moved, tensors), **settings, backend=backend)
        return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()

    return call


def over(cases: list[Any], few: list[Any]) -> pytest.MarkDecorator:
    """Every backend with every case; the slow ones with `few` instead."""
    names = [*BACKENDS, *ON_GPU]
    pairs = [(name, case) for name in names for case in dict.fromkeys(few if name in SLOW else cases)]
    ids = [f"{name}-{name_of(case)}" for name, case in pairs]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"], ids=ids)


def name_of(case: Any) -> str:
    """What in this case differs from the default."""
    return "-".join(
        f"{field.name}={getattr(case, field.name)}".replace("torch.", "").replace(" ", "")
        for field in fields(case)
        if getattr(case, field.name) != field.default
    )


def check(name: str, got: Tensor, ref: Tensor, theirs: Tensor, condition: float = 0.0, roundings: int = 1) -> None:
    """||got - ref|| <= 2 ||theirs - ref|| + tiny, and no NaN anywhere.

    PyTorch's result is sometimes exact, by luck or because a softmax of one key is 1. So tiny is one unit in the last
    place of got's dtype, or one for each time that it is rounded to it on its way, and one of float32, the latter for
    each element too, for what remains of gradients that cancel: times 1 + `condition`, by which the formula magnifies
    the rounding of its float32 intermediates.
    """
    assert got.shape == ref.shape, f"{name}: {tuple(got.shape)}, expected {tuple(ref.shape)}"
    assert not got.isnan().any(), f"{name} has {int(got.isnan().sum())} NaN"
    unit = roundings * torch.finfo(got.dtype).eps
    infinite = ref.isinf()  # the log-sum-exp of a query that sees nothing
    assert torch.equal(got[infinite].double(), ref[infinite]), f"{name} differs where {ref[infinite][:3]} is expected"
    got, theirs, ref = (tensor.double().masked_fill(infinite, 0.0) for tensor in (got, theirs, ref))
    root = math.sqrt(ref.numel())
    magnified = torch.finfo(F32).eps * (1 + condition)
    tiny = (unit + magnified) * max(float(ref.norm()), 1e-3 * root) + magnified * root
    error, their_error = float((got - ref).norm()), float((theirs - ref).nan_to_num(0.0, 0.0, 0.0).norm())
    allowed = 2 * their_error + tiny
    assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {their_error:.3g}, allowed {allowed:.3g}"


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift).to(dtype)


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Any]:
    return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


# ---- attention -------------------------------------------------------------------------------------------------------


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
        """(batch, 1, query_len, kv_len): which query sees which key, by writing down every range."""
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
    run = there(functools.partial(ops.attention, return_lse=True), backend, **case.settings())
    got = attention_results(run, case, case.dtype)
    assert got["out"].dtype == case.dtype
    assert got["lse"].dtype == F32
    ref, theirs = attention_expected(case)
    # dq and dk come of dS = P (dP - delta). Where a few keys have all the weight, two sums of head_dim terms cancel in
    # it, and what remains is their rounding: partial sums of up to sqrt(head_dim) are rounded by half a unit, head_dim
    # / 4 times where four lanes share the terms. That adds up to head_dim / 4 units, times a scale of 1/sqrt(head_dim).
    condition = dict.fromkeys(("dq", "dk"), math.sqrt(case.head_dim) / 4)
    roundings = 1
    if backend not in ("cpu", "torch"):
        # A GPU's kernels sum dP and delta in different orders; and P and dS are rounded for the tensor cores, as in
        # PyTorch on a GPU, but not on the CPU, with which they are compared here.
        condition = dict.fromkeys(condition, 2 * math.sqrt(case.head_dim))
        roundings = 2 if case.dtype != F32 else 1
    for name in ref:
        check(name, got[name], ref[name], theirs[name], condition.get(name, 0.0), roundings)


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
GRID += [  # large scores: what is rounded must cancel, also if the scale is no power of two or the queries are few
    Attention(lengths=lengths, head_dim=head_dim, magnitude=magnitude)
    for lengths in [(65, 65), (1, 1), (1, 65), (3, 130)]
    for head_dim in (64, 80)
    for magnitude in (1e3, 1e4)
]
GRID += [  # nothing to see, nobody to see it
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
TILES += [case for case in GRID if case.dropout_p or case.magnitude != 1.0 or 0 in (*case.lengths, case.batch)]


@over(GRID, TILES)
def test_attention(backend: str, case: Attention) -> None:
    check_attention(case, backend)


@pytest.mark.parametrize("backend", [name for name in SLOW if name == "simt"], indirect=True)
@pytest.mark.parametrize("head_dim", [24, 64, 100, 200])
@pytest.mark.parametrize("lengths", [(65, 65), (1, 130), (33, 97)])
def test_attention_in_tf32(backend: str, lengths: tuple[int, int], head_dim: int) -> None:
    """Operands of 11 bits: a score's error is that of so many products, and so is its exponential's relative error."""
    case = Attention(lengths=lengths, head_dim=head_dim, heads=(4, 2), batch=2)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        got = attention_results(functools.partial(ops.attention, return_lse=True, backend=backend), case, F32)
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


def dropped(backend: str, p: float, seed: int, dtype: torch.dtype = F32) -> Tensor:
    """The weights after dropout: with an identity as values, they are the output."""
    torch.manual_seed(seed)
    q, k = torch.zeros(3, 2, 200, 256, dtype=dtype), torch.zeros(3, 2, 256, 256, dtype=dtype)
    v = torch.eye(256, dtype=dtype).expand(3, 2, 256, 256)
    return ops.attention(q, k, v, causal=False, dropout_p=p, backend=backend)


def test_dropout_drops_the_same_everywhere_at_the_rate_asked_for(backend: str) -> None:
    for p in (0.1, 0.75):
        weights = dropped(backend, p, seed=7)
        assert abs(float((weights == 0).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / weights.numel())
        kept = weights[weights > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / 256 / (1 - p)))
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


def test_boundaries_of_one_row_hold_for_every_row(backend: str) -> None:
    q, k, v = (randn(3, 2, 20, 8, seed=s) for s in range(3))
    one = torch.tensor([0, 7, 7, 20])
    every = torch.tensor([0, 7, 7, 20, 27, 27, 40, 47, 47, 60])
    out = ops.attention(q, k, v, cu_seqlens=one, backend=backend)
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=every.int(), backend=backend))
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=(one.int(), every[:4]), backend=backend))
    strided = torch.stack((every, -every), dim=1)[:, 0]
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=strided, backend=backend))


def test_a_limit_beyond_every_key_is_no_limit(backend: str) -> None:
    q, k, v = (randn(1, 2, n, 8, seed=n) for n in (20, 9, 9))
    for causal in (True, False):
        free = ops.attention(q, k, v, causal=causal, backend=backend)
        for limit in (30, 2**31 - 1, 2**31, 2**63 - 1, 2**70):
            assert torch.equal(free, ops.attention(q, k, v, causal=causal, window=(limit, limit), backend=backend))


def test_the_gradient_of_the_log_sum_exp_alone(backend: str) -> None:
    case = Attention(lengths=(65, 70), heads=(4, 2), window=(20, 0))
    q, k, v = leaves(*case.inputs()[:3])
    ops.attention(q, k, v, **case.settings(), return_lse=True, backend=backend)[1].square().sum().backward()
    ref = leaves(*case.inputs()[:3], dtype=F64)
    attention_formula(case, *ref)[1].square().sum().backward()
    for ours, theirs in zip((q, k), ref, strict=False):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=2e-5, atol=2e-5)
    assert v.grad is None or not v.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_number_stays_with_those_who_see_it(backend: str, dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for which, at in itertools.product(range(3), (0, 40, 129)):
            tensors = [randn(2, 2, 130, 16, seed=s, dtype=dtype) for s in range(3)]
            clean = ops.attention(*tensors, backend=backend)
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


# ---- layer norm ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerNorm:
    width: int = 64
    rows: int = 5
    data: str = "normal"
    bias: bool = True
    residual: str | None = None  # None, "same" dtype as x, or "float32"
    parameters: str = "float32"  # or the "same" dtype as x
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
    out, total = result if isinstance(result, tuple) else (result, None)
    outputs = {"out": out} if total is None else {"out": out, "sum": total}
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


@over(LAYER_NORMS, [case for case in LAYER_NORMS if case.rows * case.width < 20_000 or case.width == 65536])
def test_layer_norm(backend: str, case: LayerNorm) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str) -> Any:
        return ops.layer_norm(x, weight, bias, eps=case.eps, residual=residual, backend=backend)

    got = layer_norm_results(there(run, backend), case)
    wide = torch.promote_types(case.dtype, F32 if case.residual == "float32" else case.dtype)
    assert got["out"].dtype == wide
    ref, theirs = layer_norm_expected(case)
    for name in ref:
        check(name, got[name], ref[name], theirs[name])


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


# ---- GELU ------------------------------------------------------------------------------------------------------------


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


@over(GELUS, [case for case in GELUS if math.prod(case.shape) < 10_000])
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


# ---- memory: what is read and what is written ------------------------------------------------------------------------

Bits = list[Tensor]


def run_all(
    backend: str, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, x: Tensor, grad_x: Tensor, **settings: Any
) -> Bits:
    """Every operation forward and backward: all that comes out."""
    results: Bits = []
    for run, inputs, grad in (
        (lambda *t: ops.attention(*t, backend=backend, **settings), (q, k, v), grad_out),
        (lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r, backend=backend), (x, x[0], x[1], grad_x), grad_x),
        (lambda x, b: ops.gelu(x, bias=b, backend=backend), (x, x[0]), grad_x),
    ):
        tensors = [t.detach().requires_grad_() for t in inputs]
        torch.manual_seed(0)
        out = run(*tensors)
        outs = list(out) if isinstance(out, tuple) else [out]
        results += [*outs, *torch.autograd.grad(outs, tensors, [grad] * len(outs))]
    return [t.detach() for t in results]


def ordinary(dtype: torch.dtype = F32) -> list[Tensor]:
    """q, k, v, grad_out of attention; x and grad_out of the others; dense."""
    return [
        *(randn(2, heads, 70, 24, seed=s, dtype=dtype) for s, heads in enumerate((4, 2, 2, 4))),
        *(randn(130, 300, seed=s, dtype=dtype) for s in (5, 6)),
    ]


def assert_same_bits(a: Bits, b: Bits) -> None:
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(one, other), f"result {i} differs by up to {(one.double() - other.double()).abs().max()}"


def offset(t: Tensor) -> Tensor:
    """The same numbers one element further on in memory: no vector is aligned any more."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def transposed(t: Tensor) -> Tensor:
    """The same numbers with the first two or the middle dimensions exchanged in memory."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.dim() == 4 else t.t().contiguous().t()


def wide_rows(t: Tensor) -> Tensor:
    """The same numbers as a slice of a larger tensor full of NaN."""
    around = t.new_full((*t.shape[:-1], t.shape[-1] + 9), math.nan)
    around[..., 4:-5] = t
    return around[..., 4:-5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [offset, transposed, wide_rows])
def test_strides_do_not_change_a_bit(kernel: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    dense = ordinary(dtype)
    assert_same_bits(run_all(kernel, *dense), run_all(kernel, *map(layout, dense)))


def test_slices_of_one_projection_and_expanded_tensors(kernel: str) -> None:
    heads, head_dim = 3, 20
    fused = randn(2, 70, 3, heads, head_dim)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))  # (B, H, T, D), nothing moved
    grad = randn(70, head_dim, seed=1).expand(2, heads, 70, head_dim)  # one gradient for all
    x, grad_x = randn(300).expand(40, 300), torch.ones(()).expand(40, 300)
    one, grad_one = randn(2, 1, 70, 20, seed=2).expand(2, 3, 70, 20), torch.ones(()).expand(2, 3, 70, 20)
    for args in ((q, k, v, grad, x, grad_x), (one, k[:1].expand(2, 3, 70, 20), v, grad_one, x, grad_x)):
        assert_same_bits(run_all(kernel, *args), run_all(kernel, *(t.contiguous() for t in args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again_and_with_any_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    tensors = ordinary(dtype)
    settings = {"dropout_p": 0.2, "window": (30, 3), "cu_seqlens": torch.tensor([0, 50, 70])}
    with threads(1):
        first = run_all(kernel, *tensors, **settings)
        assert_same_bits(first, run_all(kernel, *tensors, **settings))
    for count in (2, 3):
        with threads(count):
            assert_same_bits(first, run_all(kernel, *tensors, **settings))


def test_inputs_are_left_alone(kernel: str) -> None:
    tensors = ordinary()
    before = [t.clone() for t in tensors]
    run_all(kernel, *tensors)
    assert_same_bits(before, tensors)


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
        settings = (None, None, 0.3, True, -1, -1, 0.0, 0, native.execution(compiled, q))
    module = native.kernels(compiled, "attention")
    module.attention_forward(q, k, v, out, lse, *settings)
    gradients, around = zip(*(poisoned(*t.shape, dtype=dtype) for t in (q, k, v)), strict=True)
    module.attention_backward(grad_out, None, q, k, v, out, lse, *gradients, *settings)
    assert not lse.isnan().any()
    for inner, outer in zip((out, *gradients), (around_out, *around), strict=True):
        assert not inner.isnan().any()
        assert outer[..., :8].isnan().all()
        assert outer[..., -16:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (67, 33), (2, 1000), (300, 200)])
def test_rows_are_written_whole_and_nothing_else(compiled: str, rows: int, width: int, dtype: torch.dtype) -> None:
    flat: list[Tensor] = []
    module = native.kernels(compiled, "gelu")
    with threads(2):
        run = native.execution(compiled, torch.zeros(1))

    def output(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        """With NaN before and behind it."""
        flat.append(torch.full((math.prod(shape) + 32,), math.nan, dtype=dtype))
        return flat[-1][16:-16].view(shape)

    x, residual, grad = (randn(rows, width, seed=s, dtype=dtype) for s in range(3))
    weight, bias = randn(width, seed=3), randn(width, seed=4)
    total, mean, rstd = output(rows, width, dtype=dtype), output(rows), output(rows)
    module.layer_norm_forward(x, residual, weight, bias, output(rows, width, dtype=dtype), total, mean, rstd, 1e-5, run)
    module.layer_norm_backward(
        grad, residual, total, weight, mean, rstd, output(rows, width, dtype=dtype), output(width), output(width), run
    )
    for tanh_form in (True, False):
        module.gelu_forward(x, bias, output(rows, width, dtype=dtype), tanh_form, run)
        module.gelu_backward(grad, x, bias, output(rows, width, dtype=dtype), output(width), tanh_form, run)
    for tensor in flat:
        assert tensor[:16].isnan().all()
        assert tensor[-16:].isnan().all()
        assert not tensor[16:-16].isnan().any()


@pytest.mark.parametrize("kernel", [name for name in NATIVE if name not in SLOW], indirect=True)
def test_large_tensors_are_written_past_the_cache_too(kernel: str) -> None:
    x = randn(4100, 1030)  # above 16 MiB, with rows that do not begin on a vector
    for bias in (None, randn(1030, seed=1)):
        a, b = leaves(x, x)
        out = ops.gelu(a, bias=bias, backend=kernel)
        ref = F.gelu(b if bias is None else b + bias, approximate="tanh")
        torch.testing.assert_close(out, ref, rtol=1e-5, atol=1e-6)
        out.backward(x)
        ref.backward(x)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_merging_the_heads_of_an_output_is_free(backend: str) -> None:
    q = randn(2, 3, 5, 8)
    out = ops.attention(q, q, q, backend=backend)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


# ---- autograd and autocast -------------------------------------------------------------------------------------------


def test_the_reference_passes_gradcheck() -> None:
    q, k, v, x = leaves(*(randn(1, n, 5, 3, seed=n) for n in (2, 1, 1)), randn(3, 4), dtype=F64)
    weight, bias, residual = leaves(randn(4, seed=1), randn(4, seed=2), randn(3, 4, seed=3), dtype=F64)
    settings: dict[str, Any] = {"window": (2, 1), "causal": False, "return_lse": True, "scale": 0.7}
    check_grad = functools.partial(torch.autograd.gradcheck, raise_exception=True)
    # The log-sum-exp is float32 whatever the inputs are, too coarse for finite differences of 1e-6
    assert check_grad(lambda *t: ops.attention(*t, **settings)[0], (q, k, v))
    assert check_grad(lambda *t: ops.attention(*t, cu_seqlens=torch.tensor([0, 2, 5])), (q, k, v))
    assert check_grad(lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r), (x, weight, bias, residual))
    for approximate in ("tanh", "none"):
        assert check_grad(lambda x, b: ops.gelu(x, bias=b, approximate=approximate), (x, bias))  # noqa: B023


def test_a_second_derivative_is_refused(kernel: str) -> None:
    q, x, weight = leaves(randn(1, 1, 4, 8), randn(3, 8), randn(8))
    for out, by in (
        (ops.attention(q, q, q, backend=kernel), q),
        (ops.layer_norm(x, weight, backend=kernel), x),
        (ops.gelu(x, backend=kernel), x),
    ):
        (first,) = torch.autograd.grad(out.square().sum(), by, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_only_the_gradients_that_are_needed(backend: str) -> None:
    q, k, v, x, weight = randn(1, 2, 6, 8), *(randn(1, 2, 6, 8, seed=s) for s in (1, 2)), randn(3, 8), randn(8)
    (k,), (weight,) = leaves(k), leaves(weight)
    ops.attention(q, k, v, backend=backend).sum().backward()
    ops.layer_norm(x, weight, backend=backend).sum().backward()
    assert k.grad is not None
    assert weight.grad is not None
    assert not ops.attention(q, q, v, backend=backend).requires_grad
    with torch.no_grad():
        assert not ops.attention(q, k, v, backend=backend).requires_grad


def test_autocast(backend: str) -> None:
    q, x, weight = leaves(randn(1, 2, 6, 8), randn(3, 8), randn(8))
    with torch.autocast("cpu", dtype=BF16):
        out = ops.attention(q, q, q, backend=backend)
        assert out.dtype == BF16
        assert torch.equal(out, ops.attention(*[q.bfloat16()] * 3, backend=backend))
        hidden = F.linear(x, randn(8, 8))
        assert hidden.dtype == BF16
        assert ops.layer_norm(hidden, weight, residual=x, backend=backend)[1].dtype == F32
        assert ops.gelu(hidden, bias=weight, backend=backend).dtype == BF16
    out.sum().backward()
    assert q.grad.dtype == F32


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.layer_norm(x, self.norm.weight, self.norm.bias)
        q, k, v = self.project(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + ops.gelu(ops.attention(q, k, v).transpose(1, 2).flatten(2), bias=self.norm.bias)


def test_functional_call(backend: str) -> None:
    torch.manual_seed(0)
    block, x = Block(), randn(2, 9, 16)
    others = {name: p.detach() * 2 + 1 for name, p in block.named_parameters()}
    changed = Block()
    changed.load_state_dict(others)
    with ops.use(backend):
        others = {name: p.requires_grad_() for name, p in others.items()}
        out = torch.func.functional_call(block, others, (x,))
        assert torch.equal(out, changed(x))
        out.sum().backward()
        changed(x).sum().backward()
        for name, parameter in changed.named_parameters():
            assert torch.equal(parameter.grad, others[name].grad)


# ---- the choice of a backend -----------------------------------------------------------------------------------------


def test_use_is_a_setting_and_a_block() -> None:
    x = torch.randn(3, dtype=F64)
    assert ops.in_use() is None
    with ops.use("torch"):
        assert ops.in_use() == "torch"
        with ops.use("cpu"):
            assert ops.in_use() == "cpu"
            with pytest.raises(
                RuntimeError, match=r"backend 'cpu' cannot run gelu: it takes .*float32.*, not torch.float64"
            ):
                ops.gelu(x)
            assert ops.gelu(x, backend="torch").dtype == F64
        assert ops.in_use() == "torch"
        with contextlib.suppress(KeyError), ops.use(None):
            assert ops.in_use() is None
            raise KeyError
        assert ops.in_use() == "torch"
    assert ops.in_use() is None
    ops.use("cpu")
    assert ops.in_use() == "cpu"
    with pytest.raises(ValueError, match="unknown backend 'gpu', expected one of: cuda, cpu, triton, torch, simt"):
        ops.use("gpu")
    assert ops.in_use() == "cpu"
    ops.use(None)
    assert ops.in_use() is None


def test_the_table_of_backends() -> None:
    assert set(ops.backends()) >= {"cpu", "torch"}
    assert ops.backends()["torch"] is None
    for call in (
        lambda: ops.gelu(torch.zeros(1), backend="gpu"),
        lambda: ops.layer_norm(torch.zeros(1), torch.ones(1), backend="gpu"),
        lambda: ops.attention(*[torch.zeros(1, 1, 1, 1)] * 3, backend="gpu"),
    ):
        with pytest.raises(ValueError, match="unknown backend 'gpu'"):
            call()


def test_why_triton_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # what makes an import fail
    assert registry._why_no_triton() == 'triton is not installed; pip install "gptcore[triton]"'
    monkeypatch.undo()
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr(registry, "OLDEST_TRITON", (99, 1))
        assert re.match(r"triton \d+\.\d+\S* is too old, its kernels need 99.1; ", str(registry._why_no_triton()))


def test_none_takes_the_first_that_can() -> None:
    for dtype in (*DTYPES, F64):
        x = randn(4, 8, dtype=dtype)
        best = "torch" if dtype == F64 else "cpu"
        assert torch.equal(ops.gelu(x), ops.gelu(x, backend=best))
        name, why = ops.chosen("gelu", x)
        assert name == best
        assert "not cuda" not in why, "a CPU's tensor is not for a GPU"
        assert ("not cpu: it takes" in why) == (dtype == F64)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run attention: .* not torch.float64"):
        ops.attention(*[torch.zeros(1, 1, 1, 1, dtype=F64)] * 3, backend="cpu")
    meta = torch.zeros(2, 2, 2, 2, device="meta")
    for out in (ops.gelu(meta), ops.attention(meta, meta, meta), ops.layer_norm(meta, meta[0, 0, 0])):
        assert out.device.type == "meta"  # the formula in PyTorch runs anywhere
    with pytest.raises(RuntimeError, match="on cpu, not on meta"):
        ops.gelu(meta, backend="cpu")


def test_on_a_gpu_triton_serves_where_cuda_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor: Any = types.SimpleNamespace(device=torch.device("cuda"), dtype=BF16, is_cuda=False)  # none to verify on
    cuda, triton = registry.BACKENDS["cuda"], registry.BACKENDS["triton"]
    monkeypatch.setattr(triton, "devices", ("cuda",))
    monkeypatch.setattr(triton, "unusable", None)
    monkeypatch.setattr(cuda, "unusable", "no kernels for sm_61")
    for op in ("attention", "layer_norm", "gelu"):
        name, why = registry.chosen(op, tensor)
        assert name == "triton"
        assert "not cuda: no kernels for sm_61" in why
    monkeypatch.setattr(cuda, "unusable", None)
    assert registry.chosen("attention", tensor)[0] == "cuda"


# ---- what is refused -------------------------------------------------------------------------------------------------

T4 = torch.zeros(2, 4, 6, 8)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "3-D q": (lambda: ops.attention(T4[0], T4, T4), ValueError, r"q has shape .4, 6, 8., expected"),
    "dtypes": (lambda: ops.attention(T4, T4.half(), T4), ValueError, r"k is torch.float16 .*expected torch.float32"),
    "devices": (lambda: ops.attention(T4, T4.to("meta"), T4), ValueError, r"k is torch.float32 on meta, .* on cpu"),
    "x's device": (lambda: ops.gelu(T4, bias=torch.ones(8, device="meta")), ValueError, r"bias is .*on meta, .*on cpu"),
    "integers": (lambda: ops.attention(*[T4.int()] * 3), ValueError, r"q is torch.int32, expected a float"),
    "strides": (lambda: ops.attention(T4, T4.mT.contiguous().mT, T4), ValueError, r"k has stride 6 .*contiguous"),
    "k and v": (lambda: ops.attention(T4, T4, T4[:, :, :5]), ValueError, r"k has shape .* and v"),
    "batch": (lambda: ops.attention(T4, *[T4[:1]] * 2), ValueError, r"expected \(2, kv_heads, kv_len, 8\)"),
    "head_dim": (lambda: ops.attention(*[torch.zeros(1, 1, 2, 257)] * 3), ValueError, r"head_dim is 257, .* 256"),
    "head_dim 0": (lambda: ops.attention(*[torch.zeros(1, 1, 2, 0)] * 3), ValueError, "head_dim is 0"),
    "heads": (lambda: ops.attention(T4, *[T4[:, :3]] * 2), ValueError, "q has 4 heads, expected a multiple of the 3"),
    "no heads": (lambda: ops.attention(T4, *[T4[:, :0]] * 2), ValueError, "multiple of the 0"),
    "scale": (lambda: ops.attention(T4, T4, T4, scale=math.nan), ValueError, "scale is nan, expected a finite"),
    "scale 1e39": (lambda: ops.attention(T4, T4, T4, scale=1e39), ValueError, r"scale is 1e.39, expected a finite"),
    "window": (lambda: ops.attention(T4, T4, T4, window=(-2, 0)), ValueError, r"window is .-2, 0."),
    "window of one": (lambda: ops.attention(T4, T4, T4, window=3), ValueError, r"window is 3, expected .left, right"),
    "dropout": (lambda: ops.attention(T4, T4, T4, dropout_p=1.0), ValueError, r"dropout_p is 1.0, expected 0 <="),
    "dropout nan": (lambda: ops.attention(T4, T4, T4, dropout_p=math.nan), ValueError, "dropout_p is nan"),
    "no tensor": (lambda: ops.attention(T4, [1.0], T4), TypeError, r"k is a list, expected a torch.Tensor"),
    "no tensor q": (lambda: ops.attention(None, T4, T4), TypeError, r"q is a NoneType, expected a torch.Tensor"),
    "scale text": (lambda: ops.attention(T4, T4, T4, scale="1"), TypeError, "scale is '1', expected a number"),
    "scale tensor": (lambda: ops.attention(T4, T4, T4, scale=T4.sum()), TypeError, r"scale is tensor.*expected"),
    "dropout text": (lambda: ops.attention(T4, T4, T4, dropout_p="0"), TypeError, "dropout_p is '0', expected a"),
    "causal": (lambda: ops.attention(T4, T4, T4, causal="no"), TypeError, "causal is 'no', expected True or False"),
    "lse": (lambda: ops.attention(T4, T4, T4, return_lse=None), TypeError, "return_lse is None, expected True or"),
    "deterministic": (lambda: ops.attention(T4, T4, T4, deterministic=1), TypeError, "deterministic is 1, expected"),
    "lengths differ": (
        lambda: ops.attention(T4, *[T4[:, :, :5]] * 2, cu_seqlens=torch.tensor([0])), ValueError,
        "pair",
    ),
    "x": (lambda: ops.layer_norm(torch.zeros(()), torch.ones(1)), ValueError, r"x has shape \(\), expected"),
    "no width": (lambda: ops.layer_norm(torch.zeros(2, 0), torch.ones(0)), ValueError, "width of at least 1"),
    "weight": (lambda: ops.layer_norm(T4, torch.ones(7)), ValueError, r"weight has shape \(7,\), expected \(8,\)"),
    "weight dtype": (lambda: ops.layer_norm(T4, torch.ones(8).half()), ValueError, r"weight is torch.float16"),
    "residual": (lambda: ops.layer_norm(T4, T4[0, 0, 0], residual=T4[0]), ValueError, "residual has shape"),
    "eps": (lambda: ops.layer_norm(T4, T4[0, 0, 0], eps=-1.0), ValueError, r"eps is -1.0, expected"),
    "eps nan": (lambda: ops.layer_norm(T4, T4[0, 0, 0], eps=math.nan), ValueError, "eps is nan, expected"),
    "eps infinite": (lambda: ops.layer_norm(T4, T4[0, 0, 0], eps=math.inf), ValueError, "eps is inf, expected a"),
    "eps text": (lambda: ops.layer_norm(T4, T4[0, 0, 0], eps="1"), TypeError, "eps is '1', expected a number"),
    "integer x": (lambda: ops.layer_norm(T4.long(), T4[0, 0, 0]), ValueError, r"x is torch.int64, expected"),
    "x is no tensor": (lambda: ops.layer_norm([1.0], T4[0, 0, 0]), TypeError, r"x is a list, expected a torch.Tensor"),
    "weight is None": (lambda: ops.layer_norm(T4, None), TypeError, r"weight is a NoneType, expected a torch.Tensor"),
    "approximate": (lambda: ops.gelu(T4, approximate="fast"), ValueError, "approximate is 'fast', expected"),
    "gelu bias": (lambda: ops.gelu(T4, bias=torch.zeros(9)), ValueError, r"bias has shape \(9,\), expected the width"),
    "gelu scalar": (lambda: ops.gelu(T4.sum(), bias=T4.sum()), ValueError, r"bias has shape \(\), .* shape is \(\)"),
    "gelu integers": (lambda: ops.gelu(torch.zeros(2, dtype=torch.int64)), ValueError, r"x is torch.int64"),
    "gelu no tensor": (lambda: ops.gelu(1.0), TypeError, r"x is a float, expected a torch.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_both_backends_refuse_alike(backend: str, name: str) -> None:
    call, error, message = REFUSED[name]
    with ops.use(backend), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([], "expected"),
        ([0], "ends at 0, expected length = 6 or batch x length = 2 x 6 = 12"),
        ([1, 6], "begins with 1, expected 0"),
        ([0, 4, 3, 12], "decreases from 4 to 3 at index 2"),
        ([0, 7], "ends at 7"),
        ([0, 5, 12], "crosses the end of batch row 0 at 6"),
        ([0, 6, 13], "ends at 13"),
        ([0, 2**62, 12], "decreases"),
        ([0.0, 12.0], "int32 or int64"),
        ([[0, 12]], "1-D"),
        (([0, 6, 12], [0, 12]), "has 3 boundaries and cu_seqlens_k has 2"),
        (([0, 6, 12], [0, 7, 12]), "is not inside batch row 0"),
        (([0, 6, 12],), "pair"),
    ],
    ids=str,
)
def test_boundaries_that_are_none(backend: str, boundaries: Any, message: str) -> None:
    cu = (
        tuple(torch.tensor(cu) for cu in boundaries)
        if isinstance(boundaries, tuple)
        else torch.tensor(boundaries, dtype=None if boundaries else torch.int64)
    )
    with pytest.raises(ValueError, match=message):
        ops.attention(T4, T4, T4, cu_seqlens=cu, backend=backend)
