"""Every sample of every operation in the registry, on every backend: against the formula in float64, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grid import BACKENDS, DTYPES, F32, F64, check, running
from interpreter import interpreted  # noqa: F401
from torch import Tensor

from gptcore import ops
from gptcore.ops import registry
from gptcore.ops.operation import Sample

SAMPLES = {
    f"{operation.name} {sample.name}": (operation, sample)
    for operation in registry.OPERATIONS.values()
    for sample in operation.samples
}
TRITON = ["triton"] if ops.backends()["triton"] is None else []
RUNS = [
    (backend, name)
    for name, (operation, _) in SAMPLES.items()
    for backend in [*BACKENDS, *TRITON]
    if BACKENDS.get(backend, (backend, None))[0] in operation.implementations
]
every_run = pytest.mark.parametrize(("name", "run"), [(name, run) for run, name in RUNS])
COMPILED = ("torch", "triton", list(BACKENDS)[1])  # one instruction set is enough


def results(run: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, with the same seed for dropout and the same gradients of the outputs each time."""
    torch.manual_seed(0)
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outs = run(tensors)
    grads = [torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape).to(out.dtype) for out in outs]
    return [t.detach() for t in (*outs, *torch.autograd.grad(outs, tensors, grads))]


def of(sample: Sample, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda tensors: sample.run(tensors, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_run
def test_a_sample_agrees_with_its_formula(name: str, run: str, dtype: torch.dtype) -> None:
    _, sample = SAMPLES[name]
    tensors = sample.tensors(dtype)
    with running(run) as backend:
        got = results(of(sample, backend), tensors)
        again = results(of(sample, backend), tensors)
    ref = results(of(sample, "torch"), [tensor.double() for tensor in tensors])
    theirs = results(of(sample, "torch"), tensors)
    for i, (a, same, r, t) in enumerate(zip(got, again, ref, theirs, strict=True)):
        assert torch.equal(a.nan_to_num(), same.nan_to_num())
        check(f"{name}, result {i}", a, r.double(), t, roundings=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), [(name, run) for run, name in RUNS if run in COMPILED])
def test_a_compiled_sample_equals_eager(name: str, run: str) -> None:
    _, sample = SAMPLES[name]
    torch._dynamo.reset()
    with running(run) as backend:
        compiled = torch.compile(of(sample, backend), fullgraph=True, backend="aot_eager")
        for ours, eager in zip(
            results(compiled, sample.tensors(F32)), results(of(sample, backend), sample.tensors(F32)), strict=True
        ):
            torch.testing.assert_close(ours, eager)
            assert ours.stride() == eager.stride()
