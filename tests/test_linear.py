"""ops.linear against its formula in float64, by the rule of grid.py; autocast, edges, memory and refusals."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import BF16, DTYPES, F16, F32, F64, NATIVE, check, covering, leaves, over, randn, threads
from torch import Tensor

from gptcore import _C, ops

# The others leave linear layers to PyTorch
on_the_cpu = pytest.mark.parametrize("kernel", [name for name in NATIVE if name.startswith("cpu")], indirect=True)


@dataclass(frozen=True)
class Layer:
    shape: tuple[int, ...] = (30,)  # of x, without in_features
    sizes: tuple[int, int] = (40, 33)  # in_features, out_features
    bias: bool = True
    dtype: torch.dtype = F32
    wide: str = ""  # which of "x" and "w", weight and bias, are float32 under autocast to dtype


def results(run: Callable[..., Tensor], case: Layer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    inner, outer = case.sizes
    x, weight, bias = (
        randn(*case.shape, inner, dtype=case.dtype),
        randn(outer, inner, seed=1, scale=1 / math.sqrt(max(1, inner)), dtype=case.dtype),
        randn(outer, seed=2, dtype=case.dtype) if case.bias else None,
    )
    x, weight, bias = leaves(x, weight, bias, dtype=dtype)
    out = run(x, weight, bias)
    out.backward(randn(*case.shape, outer, seed=3, dtype=case.dtype).to(out.dtype))
    found = {"out": out.detach(), "dx": x.grad, "dweight": weight.grad}
    return found if bias is None else {**found, "dbias": bias.grad}


@functools.cache
def expected(case: Layer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return results(lambda x, w, b: F.linear(x, w, b), case, F64), results(lambda x, w, b: F.linear(x, w, b), case)


def autocast_results(run: Callable[..., Tensor], case: Layer) -> dict[str, Tensor]:
    """The numbers of `case`, rounded to its dtype, some of them in tensors of float32."""

    def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.float() if "x" in case.wide else x
        if "w" in case.wide:
            weight, bias = weight.float(), None if bias is None else bias.float()
        with torch.autocast("cpu", case.dtype):
            return run(x, weight, bias)

    return results(widened, case)


# Around the edges of tiles (12 rows or 6, panels of 32, 16 or 8 columns), bands of two tiles, stretches of 64 and 256
ROWS = [(), (1,), (11,), (13,), (25,), (49,), (97,), (3, 65), (2, 2, 7), (300,)]
IN = [1, 2, 3, 31, 33, 64, 65, 257, 514, 1025]
OUT = [1, 6, 13, 16, 17, 32, 33, 65, 130]
CASES = [
    Layer(axes["shape"], (axes["inner"], axes["outer"]), axes["bias"], axes["dtype"])
    for axes in covering(shape=ROWS, inner=IN, outer=OUT, bias=[True, False], dtype=list(DTYPES))
]
WIDE = [
    Layer(axes["shape"], (axes["inner"], axes["outer"]), axes["bias"], axes["dtype"], axes["wide"])
    for axes in covering(
        shape=[(1,), (13,), (3, 65), (130,)], inner=[1, 31, 64, 67, 130], outer=[1, 16, 33, 70], bias=[True, False],
        dtype=[BF16, F16], wide=["", "x", "w", "xw"],
    )
]  # fmt: skip


@over(CASES, CASES[:2])
def test_it_equals_the_formula(backend: str, case: Layer) -> None:
    ref, theirs = expected(case)
    for name, got in results(functools.partial(ops.linear, backend=backend), case).items():
        assert got.dtype == case.dtype
        check(name, got, ref[name], theirs[name])


@over(WIDE, WIDE[:2])
def test_autocast(backend: str, case: Layer) -> None:
    ref, theirs = expected(case)
    got = autocast_results(functools.partial(ops.linear, backend=backend), case)
    assert got["out"].dtype == case.dtype
    for name, tensor in got.items():
        check(name, tensor, ref[name], theirs[name])


@on_the_cpu
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_of_float32_weights_are_not_rounded_on_their_way(kernel: str, dtype: torch.dtype) -> None:
    x, weight, bias = leaves(randn(70, 40), randn(33, 40, seed=1), randn(33, seed=2))
    grad_out = randn(70, 33, seed=3, dtype=dtype)
    with torch.autocast("cpu", dtype):
        ops.linear(x, weight, bias, backend=kernel).backward(grad_out)
    wide, narrow = grad_out.double(), x.detach().to(dtype).double()
    torch.testing.assert_close(bias.grad, wide.sum(0).float(), rtol=1e-5, atol=1e-5)
    # x is rounded to dtype where there are instructions for that, and else used as it is
    off = min(float((weight.grad - wide.t() @ other).abs().max()) for other in (narrow, x.detach().double()))
    assert off < 1e-4
    assert float((weight.grad - weight.grad.to(dtype)).abs().max()) > 1e-4


def test_autocast_of_whatever_dtype(backend: str) -> None:
    x, weight, bias = leaves(randn(70, 40, dtype=F16), randn(33, 40, seed=1, dtype=F16), randn(33, seed=2))
    with torch.autocast("cpu", BF16):
        out = ops.linear(x, weight, bias, backend=backend)
    assert out.dtype == BF16
    out.backward(torch.ones_like(out))
    assert [t.grad.dtype for t in (x, weight, bias)] == [F16, F16, F32]
    torch.testing.assert_close(out.float(), F.linear(x.float(), weight.float(), bias), rtol=2e-2, atol=1e-1)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_spread_as_in_pytorch(kernel: str, dtype: torch.dtype) -> None:
    """Not further than to their row or column, and NaN that bits of its mantissa tell from infinity stays NaN."""
    x, weight, bias = randn(20, 37, dtype=dtype), randn(40, 37, seed=1, dtype=dtype), randn(40, seed=2, dtype=dtype)
    x[3, 5], x[7, 36], weight[9, 0], bias[11] = math.nan, math.inf, math.nan, -math.inf
    whole = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(F32)
    for wide in (False, True):
        tensors = [x, weight, bias]
        if wide:
            tensors = [tensor.float() for tensor in tensors]
            tensors[0][3, 5] = tensors[1][9, 0] = whole[0]
        tensors = leaves(*tensors)
        grad_out = randn(20, 40, seed=4, dtype=dtype)
        grad_out[2, 2] = math.inf
        with torch.autocast("cpu", dtype, enabled=wide and dtype is not F32):
            out = ops.linear(*tensors, backend=kernel)
            out.backward(grad_out)
        exact = leaves(x, weight, bias, dtype=F64)
        theirs = F.linear(*exact)
        theirs.backward(grad_out.double())
        for ours, ref in zip((out, *(t.grad for t in tensors)), (theirs, *(t.grad for t in exact)), strict=True):
            assert torch.equal(ours.isnan(), ref.isnan())
            assert torch.equal(ours.isinf(), ref.isinf())


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_only_what_needs_a_gradient_gets_one(backend: str, needs: tuple[bool, ...]) -> None:
    tensors = [randn(70, 24), randn(9, 24, seed=1), randn(9, seed=2)]
    everything = leaves(*tensors)
    F.linear(*everything).sum().backward()
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    out = ops.linear(*tensors, backend=backend)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    for tensor, need, full in zip(tensors, needs, everything, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, full.grad)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize(("train_x", "train_weight"), [(True, False), (False, True), (False, False)])
def test_only_what_the_backward_needs_is_kept(train_x: bool, train_weight: bool) -> None:
    x, weight, bias = (
        randn(70, 24).requires_grad_(train_x),
        randn(9, 24).requires_grad_(train_weight),
        leaves(randn(9))[0],
    )
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.linear(x, weight, bias, backend="cpu").sum().backward()
    assert [tensor.data_ptr() for tensor in kept] == [
        tensor.data_ptr() for tensor, needed in ((x, train_weight), (weight, train_x)) if needed
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    x, weight = randn(24, 2, 66, dtype=dtype, seed=1)[..., ::2].transpose(0, 1), randn(33, 20, dtype=dtype).t()
    bias, grad_out = randn(40, dtype=dtype)[::2], randn(20, 24, 2, dtype=dtype, seed=3).permute(2, 1, 0)
    dense = leaves(*(tensor.contiguous() for tensor in (x, weight, bias)))
    expected = F.linear(*dense)
    expected.backward(grad_out)
    strided = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    out = ops.linear(*strided, backend=backend)
    out.backward(grad_out)
    for ours, theirs in zip((out, *(t.grad for t in strided)), (expected, *(t.grad for t in dense)), strict=True):
        check("strided", ours.detach(), theirs.detach().double(), theirs.detach())


def test_a_gradient_that_is_one_number_expanded(backend: str) -> None:
    x, weight = leaves(randn(70, 24), randn(9, 24, seed=1))
    ops.linear(x, weight, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(70, 24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_nothing(backend: str, rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    x, weight, bias = leaves(
        randn(rows, inner, dtype=dtype), randn(outer, inner, dtype=dtype), randn(outer, dtype=dtype)
    )
    out = ops.linear(x, weight, bias, backend=backend)
    assert torch.equal(out, bias.expand(rows, outer))
    out.backward(torch.ones_like(out))
    assert [tuple(t.grad.shape) for t in (x, weight, bias)] == [(rows, inner), (outer, inner), (outer,)]
    assert not weight.grad.any()
    assert torch.equal(bias.grad, torch.full_like(bias, rows))


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_matter(kernel: str, dtype: torch.dtype) -> None:
    case, found = Layer((130,), (257, 70), dtype=dtype), []
    for count in (1, 2, 3, 7):
        with threads(count):
            found.append(results(functools.partial(ops.linear, backend="cpu"), case))
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outer", "inner"), [(5, 1101), (130, 1100), (33, 1024)])
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(
    kernel: str, dtype: torch.dtype, outer: int, inner: int
) -> None:
    """And of threads: few rows and many take different ways through the kernel.

    Several blocks of the sum; an odd number of 16-bit weights, pairs, and rows that share few sets of the cache.
    """
    x, weight = randn(300, inner, dtype=dtype), randn(outer, inner, seed=1, dtype=dtype)
    bias = randn(outer, seed=2, dtype=dtype)
    whole, out = torch.empty(300, outer, dtype=dtype), torch.empty(300, outer, dtype=dtype)
    _C.linear_forward(x, weight, bias, whole, 1)
    for rows in (*range(1, 65), 66, 97, 300):
        for count in (1, 2, 4):
            _C.linear_forward(x[-rows:], weight, bias, out[:rows].fill_(math.nan), count)
            assert torch.equal(out[:rows], whole[-rows:]), (rows, count)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_gradient_is_added(kernel: str, dtype: torch.dtype) -> None:
    x, grad_out, before = randn(70, 40, dtype=dtype), randn(70, 33, seed=3, dtype=dtype), randn(33, 40, seed=4)
    alone, added = torch.empty(33, 40), before.clone()
    _C.linear_backward(grad_out, x, None, None, alone, None, None, 1)
    _C.linear_backward(grad_out, x, None, None, added, None, 0.25, 1)
    torch.testing.assert_close(added, before + 0.25 * alone, rtol=1e-6, atol=1e-6)


@on_the_cpu
def test_rows_may_be_apart(kernel: str) -> None:
    """As those of logits in a padded buffer."""
    x, weight, out = randn(13, 40)[:, :33], randn(9, 50)[:, :33], torch.full((13, 20), math.nan)
    _C.linear_forward(x, weight, None, out[:, :9], 1)
    torch.testing.assert_close(out[:, :9], F.linear(x, weight))
    assert out[:, 9:].isnan().all()


@on_the_cpu
@pytest.mark.parametrize(("dtype", "inner"), [(BF16, 2048), (F32, 1024)])
def test_rows_a_page_apart(kernel: str, dtype: torch.dtype, inner: int) -> None:
    """Which would share few places of the cache, and are packed for that."""
    case = Layer((30,), (inner, 20), dtype=dtype)
    ref, theirs = expected(case)
    for name, got in results(functools.partial(ops.linear, backend=kernel), case).items():
        check(name, got, ref[name], theirs[name])


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_memory_are_neither_read_nor_written(kernel: str, dtype: torch.dtype) -> None:
    def among(*shape: int) -> tuple[Tensor, Tensor]:
        room = torch.full((math.prod(shape) + 128,), math.nan, dtype=dtype)
        return room, room[64:-64].view(shape)

    for rows, inner, outer in ((13, 35, 33), (25, 64, 17), (3, 7, 5)):
        rooms, (x, weight, bias, out, grad_out, *gradients) = zip(
            *(
                among(*shape)
                for shape in (
                    (rows, inner), (outer, inner), (outer,), (rows, outer), (rows, outer),
                    (rows, inner), (outer, inner), (outer,),
                )
            ),
            strict=True,
        )  # fmt: skip
        for seed, tensor in enumerate((x, weight, bias, grad_out)):
            tensor.copy_(randn(*tensor.shape, seed=seed, dtype=dtype))
        _C.linear_forward(x, weight, bias, out, 2)
        _C.linear_backward(grad_out, x, weight, *gradients, None, 2)
        assert not any(tensor.isnan().any() for tensor in (out, *gradients))
        assert all(room[:64].isnan().all() and room[-64:].isnan().all() for room in rooms)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit(backend: str) -> None:
    x, weight, bias = randn(4, 8), randn(9, 8), randn(9)

    def refused(error: type[Exception], match: str, *args: Any) -> None:
        with pytest.raises(error, match=match):
            ops.linear(*args, backend=backend)

    refused(TypeError, "x is a list", [1.0], weight)
    refused(TypeError, "bias is a float", x, weight, 1.0)
    refused(ValueError, r"x is torch.int64", x.long(), weight)
    refused(ValueError, r"shape \(\)", torch.tensor(1.0), weight)
    refused(ValueError, r"weight has shape \(9, 8\), expected \(out_features, 7\)", x[:, :7], weight)
    refused(ValueError, r"weight has shape \(8,\)", x, weight[0])
    refused(ValueError, r"bias has shape \(8,\), expected \(9,\)", x, weight, bias[:8])
    refused(ValueError, r"weight is torch.bfloat16, expected torch.float32", x, weight.bfloat16())
    refused(ValueError, r"bias is torch.float16, expected torch.float32", x, weight, bias.half())
    refused(ValueError, r"weight is on meta, expected cpu", x, weight.to("meta"))
    with torch.autocast("cpu", BF16):
        refused(ValueError, r"weight is torch.float64", x, weight.double())
        refused(ValueError, r"weight is torch.int8", x, weight.to(torch.int8))


def test_float64_is_for_torch_alone() -> None:
    x, weight = randn(4, 8, dtype=F64), randn(9, 8, dtype=F64)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run linear"):
        ops.linear(x, weight, backend="cpu")


def test_native_arguments_that_do_not_fit() -> None:
    x, weight, bias, out = randn(4, 8), randn(9, 8), randn(9), torch.empty(4, 9)
    gradients = [torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)]

    def refused(match: str, function: Callable[..., None], *args: Any) -> None:
        with pytest.raises(ValueError, match=match):
            function(*args)

    refused(r"x has shape \(\)", _C.linear_forward, torch.tensor(1.0), weight, bias, out, 1)
    refused(
        r"x has shape \(4, 7\), expected 4 rows of 8", _C.linear_forward, x[:, :7].contiguous(), weight, bias, out, 1
    )
    refused(r"weight has shape \(8\)", _C.linear_forward, x, weight[0], bias, out, 1)
    refused(r"bias has shape \(8\), expected \(9\)", _C.linear_forward, x, weight, bias[:8], out, 1)
    refused(r"out has shape \(9, 4\), expected 4 rows of 9", _C.linear_forward, x, weight, bias, out.view(9, 4), 1)
    refused("x is not contiguous", _C.linear_forward, randn(8, 4).t(), weight, bias, out, 1)
    refused("weight is torch.bfloat16", _C.linear_forward, x, weight.bfloat16(), bias, out, 1)
    refused("bias is torch.float16", _C.linear_forward, x, weight, bias.half(), out.bfloat16(), 1)
    refused("out is torch.float64", _C.linear_forward, x, weight, bias, out.double(), 1)
    refused("out shares memory with x", _C.linear_forward, x, randn(8, 8), None, x, 1)
    refused("num_threads is 0", _C.linear_forward, x, weight, bias, out, 0)
    for i, name in enumerate(("grad_x", "grad_weight", "grad_bias")):
        for wrong, match in ((gradients[i][:-1], "shape"), (gradients[i].double(), "torch.float64")):
            given = [*gradients[:i], wrong, *gradients[i + 1 :]]
            refused(f"{name} .*{match}", _C.linear_backward, out, x, weight, *given, None, 1)
    refused("weight is None", _C.linear_backward, out, x, None, gradients[0], None, None, None, 1)
    refused("x is None", _C.linear_backward, out, None, weight, None, gradients[1], None, None, 1)
    refused(
        r"weight has shape \(8, 9\)", _C.linear_backward, out, x, weight.view(8, 9), gradients[0], None, None, None, 1
    )
    refused(r"x has shape \(3, 8\)", _C.linear_backward, out, x[:3], None, None, gradients[1], None, None, 1)
    refused(
        "grad_x shares memory with weight",
        _C.linear_backward,
        out,
        x,
        weight,
        weight.view(-1)[:32].view(4, 8),
        None,
        None,
        None,
        1,
    )
    refused("grad_weight shares memory with x", _C.linear_backward, randn(4, 4), x, None, None, x, None, None, 1)
    refused("grad_bias shares memory with grad_out", _C.linear_backward, out, None, None, None, None, out[0], None, 1)
    refused(
        "grad_x shares memory with grad_weight",
        _C.linear_backward,
        randn(9, 9),
        randn(9, 8),
        weight,
        gradients[1],
        gradients[1],
        None,
        None,
        1,
    )
    refused(
        "scale is given, but grad_weight is None", _C.linear_backward, out, x, weight, gradients[0], None, None, 1.0, 1
    )
    narrow = gradients[1].bfloat16()
    refused("grad_weight is torch.bfloat16", _C.linear_backward, out.bfloat16(), x, None, None, narrow, None, 1.0, 1)
