"""A kernel's first use on a GPU that it has not been seen on: one small call, checked against the formula.

The tests show that a kernel is right in the model of a GPU; a driver or a new architecture can still break it. What
passes is remembered on disk, for this GPU, driver and version, so that it costs milliseconds once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptcore import _C
from gptcore.files import atomic_file, cache_folder, naming, open_file

OPS = ("attention", "layer_norm", "gelu")
_results: dict[tuple[Any, ...], str | None] = {}  # of this process: why a kernel is not to be trusted, or None


def failure(backend: str, op: str, tensor: Tensor, run: Callable[..., Any], formula: Callable[..., Any]) -> str | None:
    """Why `run`, the kernel of `op` for such tensors, is not to be trusted here, or None. Warns when it finds out."""
    kernel = (backend, op, tensor.dtype, tensor.shape[-1] if op == "attention" else None, tensor.device)
    if kernel not in _results and not _busy(tensor):
        _results[kernel] = None  # so that the calls from here are not checked in turn
        _results[kernel] = _first_use(backend, op, tensor, run, formula)
    return _results.get(kernel)


def _busy(tensor: Tensor) -> bool:
    """Whether a call now would end up in somebody's recording."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _first_use(
    backend: str, op: str, tensor: Tensor, run: Callable[..., Any], formula: Callable[..., Any]
) -> str | None:
    """What failure() says of a kernel that this process has not used yet."""
    kernel = f"{backend} {op} {tensor.dtype}" + (f" head_dim {tensor.shape[-1]}" if op == "attention" else "")
    gpu = _gpu(tensor.device)
    key = f"{gpu}: {kernel}"
    if key in _verified():
        return None
    with torch.cuda.device_of(tensor):
        reason = _compare(op, tensor, run, formula)
    if reason is None:
        _remember(key)
    else:
        warnings.warn(f"gptcore: the kernel {kernel} is wrong on {gpu}, and not used: {reason}", stacklevel=5)
    return reason


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    gpu = torch.cuda.get_device_properties(device)
    version = _C.build_info()["version"]
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, driver {_driver()}, torch {torch.__version__}, gptcore {version}"


@functools.cache
def _driver() -> int | None:
    """The version of CUDA that the driver supports; None where it is not NVIDIA's."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value or None


def _remember(key: str) -> None:
    """Adds to the file on disk; without one, the next process checks again."""
    with contextlib.suppress(OSError), atomic_file(cache_folder() / "verified.json") as file:
        file.write_text(json.dumps(sorted({*_verified(), key}), indent=1))


def _verified() -> set[str]:
    """Return the keys of the file on disk; none of a file that is absent or damaged."""
    with contextlib.suppress(OSError, ValueError):
        path = cache_folder() / "verified.json"
        with open_file(path) as file, naming(path):
            return {str(key) for key in json.load(file)}
    return set()


def _inputs(op: str, tensor: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Small random tensors of the kind of `tensor`, and the other arguments of the implementation."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    generator = torch.Generator().manual_seed(0)
    if op == "attention":  # more than one tile, grouped queries, a ragged end
        q, k, v = randn(1, 4, 150, tensor.shape[-1]), *(randn(1, 2, 150, tensor.shape[-1]) for _ in range(2))
        return [q, k, v], (None, None, None, tensor.shape[-1] ** -0.5, True, 100, -1, 0.0)
    x, weight, bias = randn(70, 776), 1 + randn(776), randn(776)
    return ([x, weight, bias], (None, 1e-5)) if op == "layer_norm" else ([x, bias], (True,))


def _gradients(run: Callable[..., Any], inputs: list[Tensor], settings: tuple[Any, ...]) -> list[Tensor]:
    """The first output and the gradients of the inputs, in float64 on the CPU."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = run(*inputs, *settings)
        out = out[0] if isinstance(out, tuple) else out
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        gradients = torch.autograd.grad(out, inputs, grad)
    return [tensor.detach().to("cpu", torch.float64) for tensor in (out, *gradients)]


def _compare(op: str, tensor: Tensor, run: Callable[..., Any], formula: Callable[..., Any]) -> str | None:
    inputs, settings = _inputs(op, tensor)
    # Vectors stay float32, as the kernels take them; what is rounded is rounded before the formula sees it, too.
    inputs = [part if part.dim() == 1 else part.to(tensor.dtype) for part in inputs]
    try:
        got = _gradients(run, [part.to(tensor.device) for part in inputs], settings)
    except RuntimeError as error:
        return str(error)
    expected = _gradients(formula, [part.double() for part in inputs], settings)
    theirs = _gradients(formula, inputs, settings)
    for a, ref, same_dtype in zip(got, expected, theirs, strict=True):
        off, usual = (float((part - ref).norm() / ref.norm()) for part in (a, same_dtype))
        if not off <= 4 * usual + 4 * torch.finfo(tensor.dtype).eps:
            return f"a relative error of {off:.2g} where {usual:.2g} is usual"
    return None
