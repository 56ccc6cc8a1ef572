"""Checks a kernel on its first use on a GPU: one small call is compared with the formula.

The tests check the kernels in the GPU simulator; a driver or a new architecture can still break one. Kernels that pass
are recorded on disk for this GPU, driver and version, so the check runs once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from gptcore import _C
from gptcore.files import read_cache, write_cache
from gptcore.ops.operation import Operation, Sample

CACHE = "verified.json"  # the kernels that passed, for later processes

_results: dict[tuple[Any, ...], str | None] = {}  # in this process: why a kernel failed its check, or None


def failure(backend: str, operation: Operation, tensor: Tensor) -> str | None:
    """Return why this backend's kernel for such tensors failed its check here, or None. Warns on the first failure."""
    if operation.first_use is None:
        return None
    head_dim = tensor.shape[-1] if operation.per_head_dim else None
    key = (backend, operation.name, tensor.dtype, head_dim, tensor.device)
    if key not in _results and not _is_recording(tensor):
        _results[key] = None  # so that the calls of the check are not checked again
        kernel = f"{backend} {operation.name} {tensor.dtype}" + (f" head_dim {head_dim}" if head_dim else "")
        _results[key] = _first_use(kernel, backend, operation.first_use(head_dim or 0), tensor)
    return _results.get(key)


def _is_recording(tensor: Tensor) -> bool:
    """Return whether torch.compile or a CUDA graph would record a call made now."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _first_use(kernel: str, backend: str, sample: Sample, tensor: Tensor) -> str | None:
    """Return the result of `failure` for a kernel that this process has not used yet."""
    gpu = _gpu(tensor.device)
    key = f"{gpu}: {kernel}"
    if key in read_cache(CACHE):
        return None
    with torch.cuda.device_of(tensor):
        reason = _compare(backend, sample, tensor)
    if reason is None:
        write_cache(CACHE, {**read_cache(CACHE), key: True})
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
    """Return the version of CUDA that the driver supports, or None without an NVIDIA driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value or None


def _gradients(backend: str, sample: Sample, inputs: list[Tensor]) -> list[Tensor]:
    """Return the first output and the gradients of the inputs, in float64 on the CPU."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = sample.run(inputs, backend=backend)[0]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out)
        gradients = torch.autograd.grad(out, inputs, grad)
    return [tensor.detach().to("cpu", torch.float64) for tensor in (out, *gradients)]


def _compare(backend: str, sample: Sample, tensor: Tensor) -> str | None:
    inputs = sample.tensors(tensor.dtype)
    try:
        got = _gradients(backend, sample, [part.to(tensor.device) for part in inputs])
    except RuntimeError as error:
        return str(error)
    expected = _gradients("torch", sample, [part.double() for part in inputs])
    theirs = _gradients("torch", sample, inputs)
    for a, ref, same_dtype in zip(got, expected, theirs, strict=True):
        off, usual = (float((part - ref).norm() / ref.norm()) for part in (a, same_dtype))
        if not off <= 4 * usual + 4 * torch.finfo(tensor.dtype).eps:
            return f"a relative error of {off:.2g} where {usual:.2g} is usual"
    return None
