"""How kernels become PyTorch operators that autograd and torch.compile understand.

An operator is a schema, a kernel for each backend, and a fake that only allocates the outputs. Kernels get real
tensors, so what depends on their values is checked there.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gptcore import _C
from gptcore.files import read_cache, write_cache

LIBRARY = torch.library.Library("gptcore", "DEF")
TILES = "triton-tiles.json"
KERNEL_BACKENDS = ("cuda", "cpu", "triton", "simt")  # all but the formula

Kernel = Callable[..., Any]


# ---- the kernels of each backend -------------------------------------------------------------------------------------


def compiled(name: str, body: Kernel, backends: Sequence[str] = ("cuda", "cpu", "simt")) -> dict[str, Kernel]:
    """Return `body` for each backend, with that backend's native function `name` as its first argument.

    Native functions write into outputs that body allocates. Their last argument, the execution, is added here.
    """
    return {backend: functools.partial(body, _native_function(backend, name)) for backend in backends}


def _native_function(backend: str, name: str) -> Kernel:
    if backend == "cpu":
        return lambda *args: getattr(_C, name)(*args, torch.get_num_threads())
    return lambda *args: getattr(module(backend), name)(*args, execution(backend, args[0]))


def triton(op: str, name: str, body: Kernel) -> dict[str, Kernel]:
    """Return `body` with the function `name` of gptcore.kernels.<op> as its first argument; imported when called.

    That function takes the arguments of the native function <op>_<name>, which checks them first: a Triton kernel reads
    whatever is at a pointer.
    """

    def kernel(*args: Any) -> None:
        getattr(_C, f"{op}_{name}")(*args, None)
        getattr(triton_module(op), name)(*args)

    return {"triton": functools.partial(body, kernel)}


@functools.cache
def triton_module(name: str) -> Any:
    """Return gptcore.kernels.<name>. Tiles that tuning finds are kept in the cache folder."""
    launch: Any = importlib.import_module("gptcore.kernels.launch")
    launch.read_tiles = functools.partial(read_cache, TILES)
    launch.write_tiles = functools.partial(write_cache, TILES)
    return importlib.import_module(f"gptcore.kernels.{name}")


@functools.cache
def module(backend: str) -> Any:
    """Return the module of a backend's native functions. The simulator's is imported when it is needed."""
    return importlib.import_module("gptcore._simt") if backend == "simt" else _C


def execution(backend: str, tensor: torch.Tensor) -> int | tuple[int, Callable[[int], torch.Tensor], bool]:
    """Return what the native functions take as `execution`; see _C.pyi."""
    if backend == "cpu":
        return torch.get_num_threads()
    stream = 0
    if tensor.is_cuda:
        current = torch.cuda.current_device()  # kernels start here, not on the stream's GPU
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


def readable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a dense tensor (..., width) with at most 8 dimensions, which native functions read."""
    if tensor is None or tensor.dim() <= 8:
        return tensor
    return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])


# ---- operators -------------------------------------------------------------------------------------------------------


def define(schema: str, kernels: Mapping[str, Kernel], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register torch.ops.gptcore.<name> and return the function that runs it. Its last argument is the backend."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema.replace(") ->", ", str backend) ->"))

    def body(*args: Any) -> Any:
        return kernels[args[-1]](*args[:-1])

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, lambda *args: body(*map(_without_subclass, args)), key)
    torch.library.register_fake(f"gptcore::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
    operator = getattr(torch.ops.gptcore, name).default
    torch.library.register_vmap(f"gptcore::{name}", functools.partial(_vmap, operator), lib=LIBRARY)
    is_backward = name.endswith("_backward")  # whose first one or two arguments are gradients

    def run(*args: Any) -> Any:
        # The dispatcher costs more than a small kernel; only tracers, subclasses and vmap need it.
        if torch.compiler.is_compiling() or is_watched(*args) or (is_backward and is_batched(*args[:2])):
            return operator(*args)
        return kernels[args[-1]](*args[:-1])

    return run


def _without_subclass(arg: Any) -> Any:
    """Return a tensor of a subclass as a torch.Tensor, whose shape is that of its memory."""
    if not isinstance(arg, torch.Tensor) or type(arg) in _PLAIN:
        return arg
    with torch._C.DisableTorchFunctionSubclass():
        plain = torch.Tensor.as_subclass(arg, torch.Tensor)
    if arg.shape != plain.shape:
        raise ValueError(
            f"a {type(arg).__name__} says that its shape is {tuple(arg.shape)}, but that of its memory is "
            f"{tuple(plain.shape)}; expected the same"
        )
    return plain


def is_batched(*tensors: torch.Tensor | None) -> bool:
    """Return whether one of these is a batch of vmap or is_grads_batched."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, tuple, list}


def is_watched(*args: Any) -> bool:
    """Return whether an argument is a subclass of torch.Tensor, or a dispatch mode is active."""
    return not _PLAIN.issuperset(map(type, args)) or torch._C._len_torch_dispatch_stack() > 0


def _vmap(operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Call an operator once for each element of the batch, for backward passes with is_grads_batched."""
    results = [
        operator(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


# ---- autograd --------------------------------------------------------------------------------------------------------


def differentiable(
    function: type[torch.autograd.Function],
    backends: Sequence[str] = KERNEL_BACKENDS,
    prepare: Callable[..., tuple[Any, ...]] = lambda *args: args,
) -> dict[str, Callable[..., Any]]:
    """Return function.apply(*prepare(...), backend) for each backend, skipping autograd where it is not needed.

    prepare: casts and copies that kernels need, differentiated by PyTorch.
    """
    apply = _apply_without_check(function)

    def run(backend: str, *args: Any) -> Any:
        if not torch.compiler.is_compiling() and any(map(_may_be_copied, args)):
            _C.check_storage(args)
        args = prepare(*args)
        if torch.compiler.is_compiling():
            return function.apply(*distinct(args), backend)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(*args, backend)
        return function.forward(_NothingToKeep(), *args, backend)

    return {backend: functools.partial(run, backend) for backend in backends}


def _may_be_copied(arg: Any) -> bool:
    """Return whether PyTorch may read this argument to copy it, before the checks of the kernel."""
    return isinstance(arg, torch.Tensor) and not (arg.dtype == torch.float32 and arg.is_contiguous())


def distinct(args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments with a view in place of a tensor that came before: torch.compile takes no tensor twice."""
    found: list[Any] = []
    for arg in args:
        seen = isinstance(arg, torch.Tensor) and any(arg is other for other in found)
        found.append(arg.view_as(arg) if seen else arg)
    return found


def _apply_without_check(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the inherited `apply` that Function.apply ends in, after its check for functorch.

    That check takes as long as a small kernel, and registry.select has made it.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward pass whose gradients raise an error if they are differentiated again."""
    words = re.findall("[A-Z][a-z]*", backward.__qualname__.partition(".")[0])  # of _LayerNorm.backward
    message = (
        f"the kernels of {'_'.join(words).lower()} have no second derivative; backend='torch' has: pass it to the "
        'call, or compute in `with ops.use("torch"):`'
    )

    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            result = backward(ctx, *grads)
        gradients = result if isinstance(result, tuple) else (result,)
        # Of the saved tensors too: the gradients depend on them, also if those of the outputs are constant
        return _NoSecondDerivative.apply(message, *gradients, *ctx.saved_tensors, *grads)[: len(gradients)]

    return run


class _NoSecondDerivative(torch.autograd.Function):
    """Returns its tensors, whose gradient raises the message."""

    @staticmethod
    def forward(ctx: Any, message: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.message = message
        return tensors

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise RuntimeError(ctx.message)


class _NothingToKeep:
    """The ctx of a forward that has no backward."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...
