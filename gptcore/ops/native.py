"""How kernels become PyTorch operators that autograd and torch.compile understand.

An operator is a schema, a body that allocates the outputs and runs a backend's kernel, and a fake of the body that only
allocates. Bodies see real tensors, so what depends on their values is checked there.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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
    torch.library.register_vmap(f"gptcore::{name}", functools.partial(_vmap, operator), lib=LIBRARY)

    def run(*args: Any) -> Any:
        # The dispatcher costs more than a small kernel; only tracers, subclasses and vmap need it.
        if torch.compiler.is_compiling() or is_watched(*args) or (backward and is_batched(*args[:2])):
            return operator(*args)
        return body(*args)

    backward = name.endswith("_backward")  # whose first one or two arguments are gradients
    return run


def is_batched(*tensors: torch.Tensor | None) -> bool:
    """Whether one of these is a batch of vmap or is_grads_batched."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, tuple, list}


def is_watched(*args: Any) -> bool:
    """Whether an argument is a subclass of torch.Tensor, or a dispatch mode records the operators that are called."""
    return not _PLAIN.issuperset(map(type, args)) or torch._C._len_torch_dispatch_stack() > 0


def _vmap(operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Call an operator once for each element of the batch, as backward passes with is_grads_batched need it."""
    results = [
        operator(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def implement(op: str, function: type[torch.autograd.Function], backends: Sequence[str] = KERNEL_BACKENDS) -> None:
    """Register function.apply(..., backend) as what runs `op` on these backends."""

    # Function.apply without its check for functorch, which takes as long as a small kernel; select() has made it.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(backend: str, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function.apply(*distinct(args), backend)
        if torch.is_grad_enabled() and any(arg.requires_grad for arg in args if isinstance(arg, torch.Tensor)):
            return apply(*args, backend)
        return function.forward(_NothingToKeep(), *args, backend)

    for backend in backends:
        registry.BACKENDS[backend].implementations[op] = functools.partial(run, backend)


def distinct(args: tuple[Any, ...]) -> list[Any]:
    """The arguments with a view in place of a tensor that came before: torch.compile takes no tensor twice."""
    found: list[Any] = []
    for arg in args:
        seen = isinstance(arg, torch.Tensor) and any(arg is other for other in found)
        found.append(arg.view_as(arg) if seen else arg)
    return found


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


def rows_and_width(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the shape of a tensor (..., width) as a matrix; (1, 1) for a scalar."""
    shape = tensor.shape
    return math.prod(shape[:-1]), shape[-1] if shape else 1


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
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype of torch.autocast on the device of a tensor, or None where it is off."""
    device = "cpu" if tensor.is_cpu else tensor.device.type  # made from nothing each time
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
