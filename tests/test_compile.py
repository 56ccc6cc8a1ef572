"""The operations under torch.compile(fullgraph=True), and the native kernels as registered PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_ops import Block
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import ops
from gptcore.ops import registry

pytestmark = pytest.mark.slow


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
SAMPLES = {
    f"{operation.name} {sample.name}": sample
    for operation in registry.OPERATIONS.values()
    for sample in operation.samples
}


def results(run: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    outs = list(out) if isinstance(out, tuple) else [out]
    weights = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in outs]
    return [*outs, *torch.autograd.grad(outs, tensors, weights)]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_slices_of_one_projection_compile(backend: str) -> None:
    def run(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ops.attention(q, k, v, backend=backend).transpose(1, 2).flatten(2)

    tensors = inputs((2, 9, 48))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, tensors), results(run, tensors), strict=True):
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


TOKENS = {3: 1, 4: 2, 5: 1}  # the dimension that grows, by the number of dimensions of a tensor
OF_ANY_LENGTH = [
    name
    for name, sample in SAMPLES.items()
    if not {"cu_seqlens", "targets"} & {*sample.settings}
    and any(len(shape) in TOKENS for shape in sample.shapes.values())
]


@pytest.mark.parametrize("name", OF_ANY_LENGTH)
def test_compiled_for_any_length(name: str) -> None:
    sample = SAMPLES[name]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return sample.run(tensors, backend="cpu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for extra in (0, 3):
        tensors = inputs(
            *(
                tuple(n + extra * (dim == TOKENS.get(len(shape))) for dim, n in enumerate(shape))
                for shape in sample.shapes.values()
            )
        )
        for ours, eager in zip(results(compiled, tensors), results(run, tensors), strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_block_through_inductor(bf16: bool) -> None:
    block, (x,) = Block(), inputs((2, 9, 16))
    compiled = torch.compile(block, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        ours, eager = compiled(x), block(x)
    torch.testing.assert_close(ours, eager, **({"rtol": 2e-2, "atol": 2e-2} if bf16 else {}))
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, *block.parameters())) for out in (ours, eager)), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 5e-2, "atol": 5e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-5}))


class Recorded(TorchDispatchMode):
    """Records the calls of gptcore's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gptcore":
            self.calls.append((func, torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*SAMPLES, "layer_norm of a residual in another dtype"])
def test_the_operators_keep_what_they_promise(name: str) -> None:
    """torch.library.opcheck: the schema tells what changes, and the fake has the real one's shapes, types, strides."""
    with Recorded() as recorded:
        if name in SAMPLES:
            results(lambda *tensors: SAMPLES[name].run(tensors, backend="cpu"), inputs(*SAMPLES[name].shapes.values()))
        else:
            x, weight = inputs((5, 12), (12,))
            options: Any = {"out_dtype": torch.bfloat16, "backend": "cpu"}
            results(lambda x, weight: ops.layer_norm(x.bfloat16(), weight, residual=x, **options), [x, weight])
    assert recorded.calls
    for func, arguments in recorded.calls:
        torch.library.opcheck(func, arguments)
