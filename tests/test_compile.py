"""The operations under torch.compile(fullgraph=True), and the native kernels as registered PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore import ops


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


QKV = ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
PACKED = torch.tensor([0, 4, 9, 9, 18])
CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "attention": (lambda b, q, k, v: ops.attention(q, k, v, backend=b), QKV),
    "window and lse": (
        lambda b, q, k, v: ops.attention_with_lse(q, k, v, causal=False, window=(3, 1), scale=0.3, backend=b),
        QKV,
    ),
    "documents": (lambda b, q, k, v: ops.attention(q, k, v, cu_seqlens=PACKED, backend=b), QKV),
    "documents of queries and keys": (
        lambda b, q, k, v: ops.attention(q, k, v, cu_seqlens=(PACKED, torch.tensor([0, 2, 7, 7, 14])), backend=b),
        ((2, 4, 9, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    ),
    "packed": (lambda b, x: ops.attention_qkvpacked(x, backend=b), ((2, 9, 3, 2, 8),)),
    "fused projection": (
        lambda b, x: ops.attention(*x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4), backend=b)
        .transpose(1, 2).flatten(2),
        ((2, 9, 48),),
    ),
    "layer norm": (lambda b, x, w, c: ops.layer_norm(x, w, c, eps=1e-3, backend=b), ((3, 5, 12), (12,), (12,))),
    "layer norm without bias": (lambda b, x, w: ops.layer_norm(x, w, backend=b), ((5, 12), (12,))),
    "residual": (
        lambda b, x, w, c, r: ops.layer_norm(x, w, c, residual=r, backend=b),
        ((3, 5, 12), (12,), (12,), (3, 5, 12)),
    ),
    "gelu": (lambda b, x: ops.gelu(x, backend=b), ((3, 5, 12),)),
    "linear": (lambda b, x, w, c: ops.linear(x, w, c, backend=b), ((3, 5, 12), (7, 12), (7,))),
    "linear without bias": (lambda b, x, w: ops.linear(x, w, backend=b), ((5, 12), (7, 12))),
    "gelu with bias": (lambda b, x, c: ops.gelu(x, bias=c, approximate="none", backend=b), ((3, 5, 12), (12,))),
}  # fmt: skip


def results(run: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    outs = list(out) if isinstance(out, tuple) else [out]
    weights = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in outs]
    return [*outs, *torch.autograd.grad(outs, tensors, weights)]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager_in_one_graph(name: str, backend: str) -> None:
    function, shapes = CASES[name]
    tensors = inputs(*shapes)
    compiled = torch.compile(lambda *t: function(backend, *t), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, tensors), results(lambda *t: function(backend, *t), tensors), strict=True):
        torch.testing.assert_close(ours, eager)
        assert ours.stride() == eager.stride()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_one_tensor_may_be_several_arguments(backend: str) -> None:
    def run(q: Tensor, x: Tensor, w: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return (
            ops.attention(q, q, q, backend=backend),
            ops.attention(q, other, other, cu_seqlens=(PACKED, PACKED), backend=backend),
            ops.layer_norm(x, w, w, backend=backend),
            *ops.layer_norm(x, w, w, residual=x, backend=backend),
            ops.gelu(w, bias=w, backend=backend),
            ops.linear(x, x, x[:, 0].contiguous(), backend=backend),
            ops.linear_cross_entropy(x, x, torch.tensor([1, 2, -100, 0, 4]), backend=backend),
        )

    tensors = inputs((2, 4, 9, 8), (5, 12), (12,), (2, 4, 9, 8))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, tensors), results(run, tensors), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiled_dropout_draws_anew_each_time(backend: str) -> None:
    compiled = torch.compile(
        lambda *t: ops.attention(*t, dropout_p=0.5, backend=backend), fullgraph=True, backend="aot_eager"
    )
    tensors = inputs(*QKV)
    first, second = compiled(*tensors), compiled(*tensors)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    again = results(compiled, tensors)
    torch.manual_seed(1)
    eager = results(lambda *t: ops.attention(*t, dropout_p=0.5, backend=backend), tensors)
    for ours, theirs in zip(again, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["attention", "residual", "gelu with bias", "linear without bias"])
def test_compiled_for_any_size(name: str) -> None:
    function, shapes = CASES[name]
    compiled = torch.compile(lambda *t: function("cpu", *t), fullgraph=True, backend="aot_eager", dynamic=True)
    for extra in (0, 3):
        tensors = inputs(
            *(
                (shape[0], *(n + extra for n in shape[1:-1]), shape[-1]) if len(shape) == 3 else shape
                for shape in shapes
            )
        )
        for ours, eager in zip(
            results(compiled, tensors), results(lambda *t: function("cpu", *t), tensors), strict=True
        ):
            torch.testing.assert_close(ours, eager)


class Block(torch.nn.Module):
    """Half a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.layer_norm(x, self.norm.weight, self.norm.bias)
        q, k, v = self.project(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + ops.gelu(ops.attention(q, k, v).transpose(1, 2).flatten(2), bias=self.norm.bias)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_block_through_inductor(bf16: bool) -> None:
    block, (x,) = Block(), inputs((2, 9, 16))
    compiled = torch.compile(block, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        ours, eager = compiled(x), block(x)
    torch.testing.assert_close(ours, eager, **({"rtol": 2e-2, "atol": 2e-2} if bf16 else {}))
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, *block.parameters())) for out in (ours, eager)), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 5e-2, "atol": 5e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-5}))


def test_the_operators_keep_what_they_promise() -> None:
    """torch.library.opcheck: the schema tells what changes, and the fake has the real one's shapes, types, strides."""
    native = torch.ops.gptcore
    q, k, v = (torch.randn(shape) for shape in QKV)
    x, weight, bias = torch.randn(5, 12), torch.randn(12), torch.randn(12)
    seed, none = torch.tensor([5]), None
    for cu, settings in (
        (none, (0.3, True, -1, -1, 0.0, "cpu")),
        (PACKED, (0.3, False, 2, 1, 0.5, "cpu")),
    ):
        arguments = (q, k, v, cu, cu, seed if cu is not None else none, *settings)
        torch.library.opcheck(native.attention_forward.default, arguments)
        out, lse = native.attention_forward(*arguments)
        grad_lse, backend = lse if cu is None else none, arguments[-1]
        for packed in (False, True):
            tensors = (out, grad_lse, q, q, q, out, lse) if packed else (out, grad_lse, q, k, v, out, lse)
            torch.library.opcheck(native.attention_backward.default, (*tensors, *arguments[3:-1], packed, backend))
    for residual in (none, x, x.bfloat16()):
        total = x if residual is none or residual is x else x.bfloat16()
        arguments = (total, weight, bias, residual, 1e-5, "cpu")
        torch.library.opcheck(native.layer_norm_forward.default, arguments)
        _, _, mean, rstd = native.layer_norm_forward(*arguments)
        for has_bias in (True, False):
            torch.library.opcheck(
                native.layer_norm_backward.default, (total, residual, total, weight, mean, rstd, has_bias, "cpu")
            )
    for maybe in (none, bias):
        torch.library.opcheck(native.gelu_forward.default, (x, maybe, True, "cpu"))
        torch.library.opcheck(native.gelu_backward.default, (x, x, maybe, False, "cpu"))
