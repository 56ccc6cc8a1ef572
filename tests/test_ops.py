"""Properties of all operations: memory, autograd, the choice of a backend, and errors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_operation import MATRIX, OF_ONE_TENSOR, ROW, every_operation, flat
from grid import BF16, DTYPES, F32, F64, NATIVE, SLOW, leaves, randn, threads
from torch import Tensor

from gptcore import ops
from gptcore.ops import native, registry

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


def rows_for(kernel: str) -> int:
    """Enough for every thread, warp or tile; Triton's interpreter runs a program a row, and slowly."""
    return 9 if kernel == "triton" else 130


def ordinary(kernel: str, dtype: torch.dtype = F32) -> list[Tensor]:
    """q, k, v, grad_out of attention; x and grad_out of the others; dense."""
    return [
        *(randn(2, heads, 70, 24, seed=s, dtype=dtype) for s, heads in enumerate((4, 2, 2, 4))),
        *(randn(rows_for(kernel), 300, seed=s, dtype=dtype) for s in (5, 6)),
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
def test_strides_do_not_change_a_bit(kernel: str, dtype: torch.dtype) -> None:
    dense = ordinary(kernel, dtype)
    expected = run_all(kernel, *dense)
    for layout in (offset, transposed, wide_rows):
        assert_same_bits(expected, run_all(kernel, *map(layout, dense)))


def test_slices_of_one_projection_and_expanded_tensors(kernel: str) -> None:
    heads, head_dim = 3, 20
    fused = randn(2, 70, 3, heads, head_dim)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))  # (B, H, T, D), nothing moved
    grad = randn(70, head_dim, seed=1).expand(2, heads, 70, head_dim)  # one gradient for all
    x, grad_x = (t.expand(rows_for(kernel), 300) for t in (randn(300), torch.ones(())))
    one, grad_one = randn(2, 1, 70, 20, seed=2).expand(2, 3, 70, 20), torch.ones(()).expand(2, 3, 70, 20)
    for args in ((q, k, v, grad, x, grad_x), (one, k[:1].expand(2, 3, 70, 20), v, grad_one, x, grad_x)):
        assert_same_bits(run_all(kernel, *args), run_all(kernel, *(t.contiguous() for t in args)))


def test_tensors_without_elements(backend: str) -> None:
    """An empty result, and zeros for whom it leaves out. The gradient of a sum has strides of 0, which say nothing."""
    for batch, query_len, kv_len in ((0, 3, 3), (1, 0, 3), (1, 3, 0), (2, 0, 0)):
        q, k, v = leaves(randn(batch, 2, query_len, 8), *(randn(batch, 2, kv_len, 8) for _ in range(2)))
        out, lse = ops.attention_with_lse(q, k, v, backend=backend)
        out.sum().backward()
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert not out.any()
        assert (lse == -math.inf).all()
        assert all(t.grad.shape == t.shape and not t.grad.any() for t in (q, k, v))
    for shape in ((0, 4), (2, 0, 4)):
        x, weight, bias = leaves(randn(*shape), randn(4), randn(4))
        ops.layer_norm(x, weight, bias, backend=backend).sum().backward()
        assert x.grad.shape == shape
        assert not weight.grad.any()
        assert not bias.grad.any()
    for shape in ((0, 4), (3, 0), (0,)):
        x, bias = leaves(randn(*shape), randn(shape[-1]))
        ops.gelu(x, bias=bias, backend=backend).sum().backward()
        assert x.grad.shape == shape
        assert not bias.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again_and_with_any_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    tensors = ordinary(kernel, dtype)
    settings = {"dropout_p": 0.2, "window": (30, 3), "cu_seqlens": torch.tensor([0, 50, 70])}
    with threads(1):
        first = run_all(kernel, *tensors, **settings)
        assert_same_bits(first, run_all(kernel, *tensors, **settings))
    for count in (2, 3):
        with threads(count):
            assert_same_bits(first, run_all(kernel, *tensors, **settings))


def test_inputs_are_left_alone(kernel: str) -> None:
    tensors = ordinary(kernel)
    before = [t.clone() for t in tensors]
    run_all(kernel, *tensors)
    assert_same_bits(before, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (67, 33), (2, 1000), (300, 200)])
def test_rows_are_written_whole_and_nothing_else(compiled: str, rows: int, width: int, dtype: torch.dtype) -> None:
    flat: list[Tensor] = []
    module = native.module(compiled)
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
        grad, residual, total, weight, mean, rstd, output(rows, width, dtype=dtype), None, output(width), output(width),
        run,
    )  # fmt: skip
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


@pytest.mark.parametrize("dims", [1, 3, 8, 9, 12])
def test_any_number_of_dimensions(backend: str, dims: int) -> None:
    results = []
    for shape in ((*[1] * (dims - 1), 8), (1, 8)):
        x, residual = leaves(randn(8).view(shape), randn(8, seed=1).view(shape))
        outs = [
            *ops.layer_norm(x, ROW, ROW, residual=residual, backend=backend), ops.gelu(x, bias=ROW, backend=backend),
            ops.linear(x, MATRIX, backend="torch" if dims > 8 else backend),
        ]  # fmt: skip
        assert [out.shape[:-1] for out in outs] == [shape[:-1]] * 4
        results.append([t.flatten() for t in (*outs, *torch.autograd.grad([t.sum() for t in outs], (x, residual)))])
    assert_same_bits(*results)
    assert ops.gelu(torch.ones(()), backend=backend).shape == ()


def test_merging_the_heads_of_an_output_is_free(backend: str) -> None:
    q = randn(2, 3, 5, 8)
    out = ops.attention(q, q, q, backend=backend)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


# ---- autograd and autocast -------------------------------------------------------------------------------------------


def test_the_reference_passes_gradcheck() -> None:
    q, k, v, x = leaves(*(randn(1, n, 5, 3, seed=n) for n in (2, 1, 1)), randn(3, 4), dtype=F64)
    weight, bias, residual = leaves(randn(4, seed=1), randn(4, seed=2), randn(3, 4, seed=3), dtype=F64)
    settings: dict[str, Any] = {"window": (2, 1), "causal": False, "scale": 0.7}
    check_grad = functools.partial(torch.autograd.gradcheck, raise_exception=True)
    assert check_grad(lambda *t: ops.attention(*t, **settings), (q, k, v))
    assert check_grad(lambda *t: ops.attention(*t, cu_seqlens=torch.tensor([0, 2, 5])), (q, k, v))
    assert check_grad(lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r), (x, weight, bias, residual))
    for approximate in ("tanh", "none"):
        assert check_grad(lambda x, b: ops.gelu(x, bias=b, approximate=approximate), (x, bias))  # noqa: B023


def test_a_second_derivative_is_refused(kernel: str) -> None:
    """Also where the gradient of the output depends on nothing, as that of a sum: not left out in silence."""
    q, qkv, x, weight = leaves(randn(1, 1, 4, 8), randn(1, 4, 3, 1, 8), randn(3, 8), randn(8))
    calls: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
        "attention": (lambda **b: ops.attention(q, q, q, **b), q),
        "attention ": (lambda **b: ops.attention_qkvpacked(qkv, **b), qkv),
        "layer_norm": (lambda **b: ops.layer_norm(x, weight, **b), x),
        "gelu": (lambda **b: ops.gelu(x, **b), x),
    }
    if kernel == "cpu":
        calls["linear"] = lambda **b: ops.linear(x, weight.expand(2, 8), **b), weight
        targets = torch.tensor([0, 1, 1])
        calls["linear_cross_entropy"] = lambda **b: ops.linear_cross_entropy(x, randn(2, 8), targets, **b), x
    for name, (run, by) in calls.items():
        message = f"the kernels of {name.strip()} have no second derivative; backend='torch' has: pass it to the call"
        for loss in (run(backend=kernel).square().sum(), run(backend=kernel).sum()):
            (first,) = torch.autograd.grad(loss, by, create_graph=True)
            with pytest.raises(RuntimeError, match=message):
                first.sum().backward()
        (first,) = torch.autograd.grad(run(backend="torch").square().sum(), by, create_graph=True)
        assert torch.autograd.grad(first.sum(), by)[0].isfinite().all()
    for of in (x, x.detach()[:, ::2], x.detach().double()):  # hessian takes what is not connected for zero
        with pytest.raises(RuntimeError, match="the kernels of gelu have no second derivative"):
            torch.autograd.functional.hessian(lambda x: ops.gelu(x.float(), backend=kernel).sum(), of)
        with pytest.raises(RuntimeError, match="the kernels of layer_norm have no second derivative"):
            torch.autograd.functional.hessian(
                lambda x: ops.layer_norm(x[0].float(), x[1].float(), backend=kernel).sum(), of
            )


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


@every_operation
def test_backward_twice_through_one_graph(backend: str, name: str) -> None:
    """Gradients belong to the caller: what it writes into them changes nothing that a later backward pass returns."""
    (x,) = leaves(randn(6, 8))
    out = flat(OF_ONE_TENSOR[name](x, backend=backend))
    (expected,) = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    expected = expected.clone()
    for scale in (1, 1, 3, 1):
        x.grad = None
        out.backward(torch.full_like(out, scale), retain_graph=True)
        torch.testing.assert_close(x.grad, scale * expected)
        x.grad.data.fill_(math.nan)
    x.grad = None
    out.backward(torch.ones_like(out), retain_graph=True)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, 2 * expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward(torch.ones_like(out))


# ---- the choice of a backend -----------------------------------------------------------------------------------------


def test_use_holds_in_a_block() -> None:
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
    with pytest.raises(ValueError, match="unknown backend 'gpu', expected one of: cuda, cpu, triton, torch, simt"):
        ops.use("gpu")
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
    tensor: Any = types.SimpleNamespace(device=torch.device("cuda"), dtype=BF16, is_cpu=False)
    monkeypatch.setattr(registry, "VERIFIED", [])
    cuda, triton = registry.BACKENDS["cuda"], registry.BACKENDS["triton"]
    monkeypatch.setattr(triton, "devices", ("cuda",))
    monkeypatch.setattr(triton, "problem", lambda: None)
    monkeypatch.setattr(cuda, "problem", lambda: "no kernels for sm_61")
    for op in ("attention", "layer_norm", "gelu"):
        name, why = registry.chosen(op, tensor)
        assert name == "triton"
        assert "not cuda: no kernels for sm_61" in why
    monkeypatch.setattr(cuda, "problem", lambda: None)
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
