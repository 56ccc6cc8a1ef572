"""The table of backends: which can run an operation here, which is chosen, and why the others are not."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

from gptcore import _C
from gptcore.ops import verify
from gptcore.ops.operation import Operation


def _no_problem() -> None:
    return None


@dataclass
class Backend:
    """One way to run the operations. `implementations` is filled in by `register`."""

    name: str
    devices: tuple[str, ...]  # device types of the tensors that it takes; () means all
    dtypes: tuple[torch.dtype, ...]
    problem: Callable[[], str | None] = _no_problem  # why this machine cannot use it, and what to do about it
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def takes(self, op: str, tensor: torch.Tensor) -> bool:
        """Return whether it has `op` for tensors of this device and dtype."""
        device = "cpu" if tensor.is_cpu else tensor.device.type  # asking for the type takes longer
        return (
            op in self.implementations and (device in self.devices or not self.devices) and tensor.dtype in self.dtypes
        )

    def refusal(self, op: str, tensor: torch.Tensor) -> str | None:
        """Return why this backend cannot run `op` on such a tensor, or None. Asks CUDA only about its tensors."""
        if not self.takes(op, tensor):
            if op not in self.implementations:
                return f"it has no {op}"
            if self.devices and tensor.device.type not in self.devices:
                return f"it takes tensors on {' or '.join(self.devices)}, not on {tensor.device}"
            return f"it takes {', '.join(map(str, self.dtypes))}, not {tensor.dtype}"
        return self.obstacle(op, tensor)

    def obstacle(self, op: str, tensor: torch.Tensor) -> str | None:
        """Return why this backend cannot run here what it takes, or None."""
        if (reason := self.problem()) is not None:
            return reason
        formula = BACKENDS["torch"].implementations[op]
        if self.implementations[op] is not formula and is_transformed():
            return (
                "its kernels do not work inside torch.func (grad, vmap, jvp, ...), forward-mode AD and "
                "torch.jit.trace; backend 'torch' does"
            )
        if self.name in VERIFIED and op in OPERATIONS:
            return verify.failure(self.name, OPERATIONS[op], tensor)
        return None


def is_transformed() -> bool:
    """Return whether torch.func, forward-mode AD or torch.jit.trace is active, which kernels would bypass."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


# The backends on which linear layers run PyTorch's operations: only the CPU has kernels for them, and Triton for
# quantized ones.
WITH_TORCH = ("torch", "cuda", "triton", "simt")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _asked_once(why: Callable[[], str | None]) -> Callable[[], str | None]:
    """Return `why` with its answer kept. torch.compile takes the answer as a constant."""
    answer = functools.cache(why)

    def ask() -> str | None:
        return answer()

    # What torch.compiler.assume_constant_result does, after importing torch._dynamo, which takes seconds
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


def _why_no_triton() -> str | None:
    try:
        spec = importlib.util.find_spec("triton")
    except ImportError:  # an import hook refuses it, for example
        spec = None
    if spec is None or spec.origin is None:
        return 'triton is not installed; pip install "gptcore[triton]"'
    # Read from the module, because it comes in several packages: triton, pytorch-triton-rocm, triton-windows.
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

# In the order of preference. `torch` takes any tensor, so backends after it are never chosen by default.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", devices=("cuda",), dtypes=FLOATS, problem=_asked_once(_C.cuda_problem)),
        Backend("cpu", devices=("cpu",), dtypes=FLOATS),
        Backend(
            "triton", devices=("cpu",) if INTERPRETED else ("cuda",), dtypes=FLOATS, problem=_asked_once(_why_no_triton)
        ),
        Backend("torch", devices=(), dtypes=(*FLOATS, torch.float64)),
        Backend("simt", devices=("cpu",), dtypes=FLOATS, problem=_asked_once(_why_no_simt)),
    )
}

# Backends whose kernels are checked on their first use
VERIFIED = [name for name, backend in BACKENDS.items() if backend.devices == ("cuda",)]

OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Add an operation to OPERATIONS, and its implementations to the backends."""
    OPERATIONS[operation.name] = operation
    formula = operation.implementations["torch"]
    checked = _with_storage_check(formula)
    for backend, implementation in operation.implementations.items():
        BACKENDS[backend].implementations[operation.name] = checked if implementation is formula else implementation
    return operation


def _with_storage_check(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return a formula that refuses tensors whose storage was resized, as kernels do: PyTorch would read beyond it."""

    @functools.wraps(formula)
    def run(*args: Any, **options: Any) -> Any:
        if not (torch.compiler.is_compiling() or is_transformed()):
            _C.check_storage(args)
        return formula(*args, **options)

    return run


# ---- the choice of a backend -----------------------------------------------------------------------------------------

_UNSET = ""
_default: str | None = None  # of the process
_in_context: ContextVar[str | None] = ContextVar("gptcore backend", default=_UNSET)
# in_use() after the last change in any thread: torch.compile can guard on this, but not on a ContextVar.
_latest: str | None = None


class use:
    """Run the operations of the current thread or asyncio task on this backend; None chooses for each call.

    Holds from this call on or, as a context manager, until the end of the block, as torch.set_grad_enabled does. Other
    threads and tasks follow `set_default_backend`. A function compiled by torch.compile follows the last change,
    whichever thread made it.

    Raises ValueError for an unknown name and RuntimeError for a backend that is not usable here.
    """

    def __init__(self, backend: str | None) -> None:
        _check_usable(backend)
        self._token = _in_context.set(backend)
        _note_change()

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ValueError):  # the block ends in another context, such as that of a generator
            _in_context.reset(self._token)
        _note_change()


def set_default_backend(backend: str | None) -> None:
    """Run the operations of all threads on this backend, except where `use` holds; None chooses for each call.

    Raises ValueError for an unknown name and RuntimeError for a backend that is not usable here.
    """
    global _default
    _check_usable(backend)
    _default = backend
    _note_change()


def _check_usable(backend: str | None) -> None:
    if backend is not None and (reason := _known(backend).problem()):
        raise RuntimeError(f"backend {backend!r} is not usable here: {reason}")


def _note_change() -> None:
    global _latest
    name = _in_context.get()
    _latest = _default if name == _UNSET else name


def in_use() -> str | None:
    """Return the backend set by `use`, else by `set_default_backend`, or None if each call chooses."""
    if torch.compiler.is_compiling():
        return _latest
    name = _in_context.get()
    return _default if name == _UNSET else name


def backends() -> dict[str, str | None]:
    """Return every backend by name, with the reason why it is not usable on this machine, or None where it is."""
    return {backend.name: backend.problem() for backend in BACKENDS.values()}


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def select(op: str, backend: str | None, tensor: torch.Tensor) -> Callable[..., Any]:
    """Return the implementation of `op` for such a tensor: by `backend`, else by `in_use()`, else the first usable.

    Raises ValueError if the name is unknown, RuntimeError if the requested backend cannot run the call.
    """
    name = backend if backend is not None else in_use()
    if name is None:
        return _first_able(op, tensor).implementations[op]
    asked = _known(name)
    if (reason := asked.refusal(op, tensor)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run {op}: {asked.problem() or reason}")
    return asked.implementations[op]


def chosen(op: str, tensor: torch.Tensor) -> tuple[str, str]:
    """Return the backend that runs `op` on such a tensor by default, and why the preferred ones do not.

    Raises RuntimeError, with every reason, if no backend can.
    """
    if (name := in_use()) is not None:
        return name, "set by ops.use"
    able = _first_able(op, tensor)
    before = list(BACKENDS.values())[: list(BACKENDS).index(able.name)]
    passed = [f"not {b.name}: {b.refusal(op, tensor)}" for b in before if tensor.device.type in b.devices]
    return able.name, "; ".join(passed) or "the first choice for this device and dtype"


def _first_able(op: str, tensor: torch.Tensor) -> Backend:
    for backend in BACKENDS.values():
        if backend.takes(op, tensor) and backend.obstacle(op, tensor) is None:
            return backend
    reasons = "; ".join(f"not {backend.name}: {backend.refusal(op, tensor)}" for backend in BACKENDS.values())
    raise RuntimeError(f"no backend can run {op}: {reasons}")
