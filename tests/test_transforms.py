"""Operations inside torch.func, torch.jit.trace and wrapper subclasses, on the meta device, and modified in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import every_operation as tables
import pytest
import torch
import torch.nn.functional as F
from every_operation import HERE, OF_ALL_TENSORS, OF_ONE_TENSOR, as_heads, every_operation, every_tensor, flat
from grid import BF16, F32, leaves, randn
from interpreter import interpreted  # noqa: F401
from test_ops import Bits, assert_same_bits
from torch import Tensor

from gptcore import ops

# ---- PyTorch's transforms --------------------------------------------------------------------------------------------


def tangents(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = run(torch.autograd.forward_ad.make_dual(x, x.cos()))
        tangent: Tensor = torch.autograd.forward_ad.unpack_dual(out).tangent
        return tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda run, x: torch.func.grad(lambda x: run(x).square().sum())(x),
    "vmap": lambda run, x: torch.func.vmap(run)(torch.stack((x, 2 * x, -x))),
    "per-sample gradients": lambda run, x: torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(
        torch.stack((x, 2 * x))
    ),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x.cos(),))[1],
    "hessian": lambda run, x: torch.func.hessian(lambda x: run(x).square().sum())(x),
    "forward AD": tangents,
}


@every_operation
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_fall_back_to_the_formula(transform: str, name: str) -> None:
    run, x = OF_ONE_TENSOR[name], randn(6, 8)
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(
        apply(lambda x: flat(run(x)), x), apply(lambda x: flat(run(x, backend="torch")), x), rtol=0, atol=0
    )


def test_a_compiled_transform_falls_back_to_the_formula() -> None:
    x = randn(6, 8)
    for transform in (torch.func.grad, torch.func.jacfwd):
        compiled = torch.compile(transform(lambda x: ops.gelu(x).square().sum()), fullgraph=True, backend="aot_eager")
        expected = transform(lambda x: ops.gelu(x, backend="torch").square().sum())(x)
        torch.testing.assert_close(compiled(x), expected)


def test_a_kernel_says_that_it_cannot_be_transformed(kernel: str) -> None:
    x, message = randn(6, 8), "cannot run .*: its kernels do not work inside torch.func .* backend 'torch' does"
    for name in ("attention", "layer_norm", "gelu"):
        run = functools.partial(OF_ONE_TENSOR[name], backend=kernel)
        for apply in (*TRANSFORMS.values(), torch.jit.trace):
            with pytest.raises(RuntimeError, match=message):
                apply(lambda x, run=run: flat(run(x)), x)


@every_operation
def test_batched_gradients_of_a_kernel(backend: str, name: str) -> None:
    run, (x,) = OF_ONE_TENSOR[name], leaves(randn(6, 8))
    out = flat(run(x, backend=backend))
    grads = torch.eye(len(out))[: min(9, len(out))]
    (batched,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    (mapped,) = torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True))(grads)
    expected = torch.stack([torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads])
    for gradients in (batched, mapped):
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_operation
def test_a_trace_computes(name: str) -> None:
    """Other numbers than those that it was traced with, also with gradients."""
    run = OF_ONE_TENSOR[name]
    traced = torch.jit.trace(lambda x: flat(run(x)), (randn(6, 8),))
    ours, theirs = leaves(randn(6, 8, seed=1), randn(6, 8, seed=1))
    for x, out in ((ours, traced(ours)), (theirs, expected := flat(run(theirs, backend="torch")))):
        torch.testing.assert_close(out, expected.detach() if x is theirs else flat(run(theirs, backend="torch")))
        out.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# ---- other tensors, devices and defaults -----------------------------------------------------------------------------


@every_operation
@pytest.mark.parametrize("backend", HERE)
def test_outputs_may_be_modified_in_place(backend: str, name: str) -> None:
    """And the gradients are right, or autograd says that the backward pass needs the output, as for PyTorch's own."""
    run, factor = OF_ONE_TENSOR[name], torch.full((), 2.0, requires_grad=True)
    x = randn(6, 8)
    (leaf,) = leaves(x)
    out = run(leaf, backend=backend)
    for i in range(len(out) if isinstance(out, tuple) else 1):

        def output(x: Tensor, i: int = i) -> Tensor:
            result: Any = run(x, backend=backend)
            part: Tensor = result[i] if isinstance(result, tuple) else result
            return part

        (expected,) = torch.autograd.grad(2.0 * output(leaf).sum(), leaf)
        out = output(leaf).mul_(2.0)
        F.dropout(out, 0.0, inplace=True)
        is_saved = name in ("attention", "documents", "qkvpacked") or (name == "residual" and i == 1)
        if is_saved and (backend != "torch" or (name == "documents" and i == 1)):
            with pytest.raises(
                RuntimeError, match=r"modified by an inplace operation: .* which is output \d of \w+, is at"
            ):
                torch.autograd.grad(out.sum(), leaf)
        else:
            torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], expected)
        with torch.no_grad():
            out = output(x)
        assert out.mul_(factor).requires_grad  # a view made without grad mode would refuse it


def test_pytorch_refuses_the_same_changes_in_place() -> None:
    """F.scaled_dot_product_attention reads its output in the backward pass, and F.layer_norm its input."""
    (x,), row = leaves(randn(6, 8)), torch.ones(8)
    summed = 2 * x
    normalised = F.layer_norm(summed, (8,), row)
    summed.mul_(2.0)
    for out in (F.scaled_dot_product_attention(*as_heads(x), is_causal=True).mul_(2.0), normalised):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


class Wrapper(torch.Tensor):
    """A tensor that holds another, as those of DTensor and torchao do, and has no memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = torch.utils._pytree.tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, Wrapper, function(*inner[0], **inner[1]))


@every_tensor
@pytest.mark.parametrize("backend", HERE)
def test_any_argument_may_be_a_wrapper_subclass(backend: str, name: str, argument: int) -> None:
    run, tensors = OF_ALL_TENSORS[name]
    results = []
    for wrap in (lambda t: t, Wrapper):
        inputs = leaves(*tensors)
        inputs[argument] = wrap(tensors[argument].clone()).requires_grad_()
        out = run(*inputs, backend=backend)
        outs = list(out) if isinstance(out, tuple) else [out]
        grads = torch.autograd.grad([t.square().sum() for t in outs], inputs)
        results.append([t.inner if isinstance(t, Wrapper) else t for t in (*outs, *grads)])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@every_operation
@pytest.mark.parametrize("backend", HERE)
def test_default_dtype_and_device_change_nothing(backend: str, name: str) -> None:
    run, x = OF_ONE_TENSOR[name], randn(6, 8)
    if "attention" in name or name in ("documents", "qkvpacked"):
        run = functools.partial(run, dropout_p=0.5)

    def results() -> Bits:
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        out = flat(run(leaf, backend=backend))
        return [out, *torch.autograd.grad(out, leaf, torch.ones_like(out))]

    expected = results()
    try:
        torch.set_default_dtype(BF16)
        with torch.device("meta"):
            others = results()
    finally:
        torch.set_default_dtype(F32)
    assert_same_bits(others, expected)


@every_operation
def test_the_meta_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("TARGETS", "CU", "ROW", "ONES", "MATRIX"):
        monkeypatch.setattr(tables, constant, getattr(tables, constant).to("meta"))
    x = torch.empty(6, 8, device="meta", requires_grad=True)
    out = flat(OF_ONE_TENSOR[name](x))
    out.sum().backward()
    assert out.is_meta
    assert x.grad is not None
    assert x.grad.shape == x.shape
