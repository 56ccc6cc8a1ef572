"""The table of backends: which can run an operation here, which is chosen, and of each other why not."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

from gptcore import _C
from gptcore.ops import verify


@dataclass
class Backend:
    """One way to run the operations. `implementations` is filled in by the file of each operation."""

    name: str
    devices: tuple[str, ...]  # device types of the tensors that it takes; () means all
    dtypes: tuple[torch.dtype, ...]
    unusable: str | None = None  # why this machine cannot use it, and what to do about it
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def refusal(self, op: str, tensor: torch.Tensor) -> str | None:
        """Why this backend cannot run `op` on such a tensor, or None."""
        if self.unusable:
            return self.unusable
        if op not in self.implementations:
            return f"it has no {op}"
        if self.devices and tensor.device.type not in self.devices:
            return f"it takes tensors on {' or '.join(self.devices)}, not on {tensor.device}"
        if tensor.dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, not {tensor.dtype}"
        if is_transformed() and self.implementations[op] is not BACKENDS["torch"].implementations[op]:
            return (
                "its kernels do not work inside torch.func (grad, vmap, jvp, ...), forward-mode AD and "
                "torch.jit.trace; backend 'torch' does"
            )
        if self.name in VERIFIED and op in verify.OPS:
            formula = BACKENDS["torch"].implementations[op]
            return verify.failure(self.name, op, tensor, self.implementations[op], formula)
        return None


def is_transformed() -> bool:
    """Whether torch.func, forward-mode AD or torch.jit.trace is active, which kernels would bypass."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (not torch.compiler.is_compiling() and torch.jit.is_tracing())
    )


# Those that leave to PyTorch what gptcore has a kernel for on the CPU alone: the loss and the optimizer.
WITH_TORCH = ("torch", "cuda", "triton", "simt")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _why_no_triton() -> str | None:
    try:
        spec = importlib.util.find_spec("triton")
    except ImportError:  # something keeps it from being imported
        spec = None
    if spec is None or spec.origin is None:
        return 'triton is not installed; pip install "gptcore[triton]"'
    # The module has one name, its package several: triton, pytorch-triton-rocm, triton-windows.
    version = re.search(r"__version__ = ['\"]([\d.]+)", Path(spec.origin).read_text(encoding="utf-8"))
    if version and tuple(map(int, version[1].split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"triton {version[1]} is too old, its kernels need {oldest}; take a newer PyTorch, which brings one, "
            "or pip install -U triton"
        )
    if not torch.cuda.is_available() and not INTERPRETED:
        return "no GPU; set TRITON_INTERPRET=1 to run its kernels slowly on CPU tensors"
    return None


def _why_no_simt() -> str | None:
    if importlib.util.find_spec("gptcore._simt") is None:
        return "not built: the module gptcore._simt is missing; reinstall gptcore"
    return None


OLDEST_TRITON = (3, 4)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# In the order in which they are tried when none is asked for. `torch` takes any tensor: what follows is never chosen.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", devices=("cuda",), dtypes=FLOATS, unusable=_C.cuda_problem()),
        Backend("cpu", devices=("cpu",), dtypes=FLOATS),
        Backend("triton", devices=("cpu",) if INTERPRETED else ("cuda",), dtypes=FLOATS, unusable=_why_no_triton()),
        Backend("torch", devices=(), dtypes=(*FLOATS, torch.float64)),
        Backend("simt", devices=("cpu",), dtypes=FLOATS, unusable=_why_no_simt()),
    )
}

VERIFIED = [name for name, backend in BACKENDS.items() if backend.devices == ("cuda",)]  # before a kernel's first use

_in_use: str | None = None


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def select(op: str, backend: str | None, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of `op` for such a tensor: of `backend`, else of that set by `use`, else the first that can.

    Raises ValueError if the name is unknown, RuntimeError if the backend that was asked for cannot serve the call.
    """
    name = backend if backend is not None else _in_use
    if name is not None:
        reason = _known(name).refusal(op, tensor)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}")
        return BACKENDS[name].implementations[op]
    for candidate in BACKENDS.values():
        if candidate.refusal(op, tensor) is None:
            return candidate.implementations[op]
    return BACKENDS[chosen(op, tensor)[0]].implementations[op]  # raises


def chosen(op: str, tensor: torch.Tensor) -> tuple[str, str]:
    """The backend that runs `op` on such a tensor when the call asks for none, and why none before it for this device.

    Raises RuntimeError, with every reason, where none can.
    """
    if _in_use is not None:
        return _in_use, "set by ops.use"
    passed: dict[str, str] = {}
    for backend in BACKENDS.values():
        if (reason := backend.refusal(op, tensor)) is None:
            near = [why for name, why in passed.items() if tensor.device.type in BACKENDS[name].devices]
            return backend.name, "; ".join(near) or "the first choice for this device and dtype"
        passed[backend.name] = f"not {backend.name}: {reason}"
    raise RuntimeError(f"no backend can run {op}: {'; '.join(passed.values())}")


class use:
    """Run the operations on this backend from now on, or within a `with` block; None chooses for each call again.

    Raises ValueError for an unknown name and RuntimeError for a backend that is not usable here.
    """

    def __init__(self, backend: str | None) -> None:
        global _in_use
        if backend is not None and (reason := _known(backend).unusable):
            raise RuntimeError(f"backend {backend!r} is not usable here: {reason}")
        self._before = _in_use
        _in_use = backend

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _in_use
        _in_use = self._before


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it is not usable on this machine, or None where it is."""
    return {backend.name: backend.unusable for backend in BACKENDS.values()}


def in_use() -> str | None:
    """The backend set by `use`, or None if each call chooses."""
    return _in_use
