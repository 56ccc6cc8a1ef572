"""The rule of the kernel grid: every operation x backend x dtype x shape against its formula in float64.

A result passes if its error is at most twice that of PyTorch's own operation in the same dtype, plus one rounding. Each
operation has a file of cases, with formulas that are written down on their own and share nothing with gptcore.ops.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore import _C, ops

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16)
# The argument `backend`, and for the CPU's kernels the instruction set. A new backend is one more line here.
BACKENDS = {"torch": ("torch", None), **{f"cpu-{isa}": ("cpu", isa) for isa in _C.supported_isas()}}
# The CUDA kernels in the GPU simulator. A case takes a thousand times as long there, so it runs a smaller
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
    """Every backend with every case; the slow ones with `few` instead.

    The backends of a case follow each other, so that one worker of pytest-xdist computes what is expected for all.
    """
    runs = {name: set(few if name in SLOW else cases) for name in [*BACKENDS, *ON_GPU]}
    pairs = [(name, case) for case in dict.fromkeys([*cases, *few]) for name in runs if case in runs[name]]
    ids = [f"{name}-{name_of(case)}" for name, case in pairs]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"], ids=ids)


def name_of(case: Any) -> str:
    """Return the fields of a case that differ from their defaults."""
    return "-".join(
        f"{field.name}={getattr(case, field.name)}".replace("torch.", "").replace(" ", "")
        for field in fields(case)
        if getattr(case, field.name) != field.default
    )


def check(name: str, got: Tensor, ref: Tensor, theirs: Tensor, condition: float = 0.0, roundings: int = 1) -> None:
    """Assert ||got - ref|| <= 2 ||theirs - ref|| + tiny, and that there is no NaN."""
    judge(name, [errors(name, got, ref, theirs, condition, roundings)])


def judge(name: str, draws: list[tuple[float, float, float]]) -> None:
    """Assert that the result of errors(), or its medians over several draws of the inputs, is within bounds."""
    error, their_error, allowed = map(statistics.median, zip(*draws, strict=True))
    assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {their_error:.3g}, allowed {allowed:.3g}"


def errors(
    name: str, got: Tensor, ref: Tensor, theirs: Tensor, condition: float = 0.0, roundings: int = 1
) -> tuple[float, float, float]:
    """||got - ref||, ||theirs - ref|| and 2 ||theirs - ref|| + tiny. Fails on a NaN, and on infinities that differ.

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
    return error, their_error, 2 * their_error + tiny


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift).to(dtype)


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Any]:
    return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
