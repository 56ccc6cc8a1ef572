"""How kernels become PyTorch operators that autograd and torch.compile understand.

An operator is a schema, a body that allocates the outputs and runs a backend's kernel, and a fake of the body that only
allocates. Bodies see real tensors, so what depends on their values is checked there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from gptcore.ops import registry

LIBRARY = torch.library.Library("gptcore", "DEF")
KERNEL_BACKENDS = ("cuda", "cpu", "triton", "simt")  # all but the reference


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register torch.ops.gptcore.<name> and return the function that runs it."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, body, key)
    torch.library.register_fake(f"gptcore::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.gptcore, name).default

    def run(*args: Any) -> Any:
        # The dispatcher costs more than a small kernel, and only those who trace or fake tensors need it.
        return operator(*args) if torch.compiler.is_compiling() or is_watched(args[0]) else body(*args)

    return run


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is none that a kernel could read, or something records the operators that are called."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0


def implement(op: str, function: type[torch.autograd.Function], backends: Sequence[str] = KERNEL_BACKENDS) -> None:
    """Register function.apply(..., backend) as what runs `op` on these backends."""

    # What function.apply comes to where functorch is not at work; finding that out takes it as long as a small kernel.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(backend: str, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args, backend)
        if _is_differentiated(args):
            return apply(*args, backend)
        return function.forward(_NothingToKeep(), *args, backend)

    for backend in backends:
        registry.BACKENDS[backend].implementations[op] = functools.partial(run, backend)


def _is_differentiated(args: tuple[Any, ...]) -> bool:
    """Whether autograd, in either direction, has to see this call."""
    if torch.is_grad_enabled() and any(arg.requires_grad for arg in args if isinstance(arg, torch.Tensor)):
        return True
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a compiler, a tracer, functorch or dual numbers are at work, which PyTorch's own functions serve best."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own, for a fraction of its time where nobody will differentiate again."""
    checked = torch.autograd.function.once_differentiable(backward)

    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


class _NothingToKeep:
    """The context of a forward that has no backward."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


@functools.cache
def kernels(backend: str, op: str) -> Any:
    """The module whose `<op>_forward` or, of Triton, `forward` runs on this backend."""
    names = {"simt": "gptcore._simt", "triton": f"gptcore.kernels.{op}"}
    return importlib.import_module(names.get(backend, "gptcore._C"))


def execution(backend: str, tensor: torch.Tensor) -> int | tuple[int, Callable[[int], torch.Tensor], bool]:
    """What the native functions take as `execution`; see _C.pyi."""
    if backend == "cpu":
        return torch.get_num_threads()
    stream = 0
    if tensor.is_cuda:
        current = torch.cuda.current_device()  # where kernels start, whatever the stream
        if tensor.get_device() != current:
            raise ValueError(
                f"the tensors are on {tensor.device}, expected the current GPU, cuda:{current}; "
                f"use them in `with torch.cuda.device({tensor.get_device()}):`"
            )
        stream = torch.cuda.current_stream().cuda_stream
    return (
        stream,
        lambda size: torch.empty(size, dtype=torch.uint8, device=tensor.device),
        torch.backends.cuda.matmul.allow_tf32,
    )


def check_tensors(*, optional: bool = False, **tensors: object) -> None:
    """Raises TypeError for the first argument that is no tensor (nor None, if optional)."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) and not (optional and tensor is None):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")


def check_numbers(**numbers: object) -> None:
    """Raises TypeError for the first that is no number: a tensor, say, whose gradient would be lost."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, _NUMBERS):
            raise TypeError(f"{name} is {number!r}, expected a number")


_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def check_flags(**flags: object) -> None:
    """Raises TypeError for the first that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}, expected True or False")


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Inside torch.autocast, float32 tensors in its dtype, as for PyTorch's own attention; else as they are."""
    device = "cpu" if tensors[0].is_cpu else tensors[0].device.type  # made from nothing each time
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in tensors)
