"""Output projection fused with cross entropy, without materialising the logits of all tokens.

The forward pass computes loss and gradients chunk by chunk, and the backward pass scales the gradients by that of the
scalar loss, as in Liger kernels (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

import functools
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import _C
from gptcore.ops import arguments, native, registry
from gptcore.ops.linear import uses_kernel
from gptcore.ops.operation import Operation, Sample

CHUNK = 512  # minimum tokens per chunk: with fewer, matmuls are slower and grad_weight is accumulated more often
CHUNK_BYTES = 32 << 20  # a chunk has more tokens while its logits fit in this
VOCAB_BLOCK = 4096  # rows of grad_weight per matmul: their 16-bit product stays in the cache until it is accumulated
LARGE = 4 << 20  # bytes: smaller buffers come from PyTorch's allocator
GPU_CHUNK_BYTES = 512 << 20  # on a GPU: matmuls of thousands of rows, and few launches
# The row stride of the logits is a multiple of this: unaligned rows make matmuls slower
ROW = 16


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str | None = None
) -> Tensor:
    """Return the mean of -log softmax(x @ weight.T)[target] over the targets that are not ignore_index.

    The logits have the dtype of F.linear's result; softmax, loss and the accumulation of grad_weight are float32. The
    matmuls are ours where ops.linear's kernel is the faster one, else PyTorch's, whose last bits may depend on the
    number of threads. On GPUs the backends `cuda` and `triton` have the same Triton kernel between PyTorch's matmuls;
    without Triton, `cuda` is PyTorch's formula.

    Args:
        x: (..., width), the last hidden states.
        weight: (vocabulary, width), in x's dtype; any floating-point dtype under torch.autocast.
        targets: int64, the shape of x without its last dimension.
        ignore_index: targets with this value add nothing to the loss, and their x gets a gradient of 0.

    Returns:
        A float32 scalar; 0, with gradients of 0, if all targets are ignored.

    Raises:
        ValueError: shapes, dtypes or targets that do not fit, with what was expected. Targets on a GPU are not read
            back: one outside of the vocabulary makes the loss and the gradients NaN in the Triton kernel, and fails
            PyTorch's own assertions on backend `torch`, also in torch.compile.
        TypeError: an argument has the wrong type.
        RuntimeError: the requested backend cannot run the call.
    """
    arguments.check_tensors(x=x, weight=weight, targets=targets)
    dtype = _check(x, weight, targets)
    loss: Tensor = registry.select("linear_cross_entropy", backend, x)(x, weight, targets, dtype, ignore_index)
    return loss


def _check(x: Tensor, weight: Tensor, targets: Tensor) -> torch.dtype:
    """Return the dtype of the logits. Raises ValueError for arguments that do not fit."""
    if x.dim() < 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected a floating-point dtype and (..., width)")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (vocabulary, {x.shape[-1]}) for x's width")
    if targets.dtype != torch.int64 or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}, expected int64 of {tuple(x.shape[:-1])}"
        )
    if weight.device != x.device or targets.device != x.device:
        raise ValueError(
            f"x is on {x.device}, weight on {weight.device}, targets on {targets.device}; expected one device"
        )
    dtypes = [tensor.dtype for tensor in (x, weight)]
    if (lower := arguments.autocast_dtype(x)) is not None:
        dtypes = [dtype if dtype == torch.float64 else lower for dtype in dtypes]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"weight is {weight.dtype}, expected {x.dtype} like x")
    return dtypes[0]


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if wrong.any():
        index = int(wrong.flatten().int().argmax())
        raise ValueError(
            f"target {int(targets.flatten()[index])} at index {index} is outside of the vocabulary of {vocab} tokens, "
            f"and not {ignore_index}, which is ignored"
        )


# ---- torch: the formula in plain PyTorch -----------------------------------------------------------------------------


def _linear_cross_entropy_torch(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, ignore_index: int
) -> Tensor:
    if targets.is_cpu and not torch.compiler.is_compiling() and not native.is_batched():
        _check_targets(targets, weight.shape[0], ignore_index)
    vocab = weight.shape[0]
    padding = -vocab % ROW if targets.device.type == "cuda" else 0
    if padding:
        logits = F.linear(x.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, padding)))[..., :vocab]
    else:
        logits = F.linear(x.to(dtype), weight.to(dtype))
    logits = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
    logits, targets = logits.to(torch.promote_types(dtype, torch.float32)), targets.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


# ---- cpu: kernels/cpu/cross_entropy.cpp, and the matmul of kernels/cpu/linear.cpp or PyTorch -------------------------


def _forward_native(
    cross_entropy: native.Kernel, x: Tensor, weight: Tensor, targets: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, ignore_index, need_x, need_weight = settings
    vocab = weight.shape[0]
    counted = (targets != ignore_index).nonzero().flatten()
    count, everything = len(counted), len(counted) == len(targets)
    kept = targets.contiguous() if everything else targets.index_select(0, counted)
    low, high = kept.aminmax() if count > 0 else (0, 0)
    if low < 0 or high >= vocab:
        _check_targets(targets, vocab, ignore_index)
    targets = kept
    rows = (x if everything else x.index_select(0, counted)).to(dtype).contiguous()
    narrow = weight.contiguous() if weight.dtype == dtype else _kept("narrow", weight.shape, dtype).copy_(weight)
    # 1 / count is applied after the sums: softmax / count would underflow in float16
    scale = 1.0 / max(1, count)
    grad_rows = torch.empty_like(rows if need_x else rows[:0])
    grad_weight = _kept("gradient", weight.shape if need_weight else (0,), torch.float32)
    in_kernel = uses_kernel(dtype, training=need_x or need_weight)
    if count == 0 or in_kernel:
        grad_weight.zero_()

    threads = torch.get_num_threads()
    most = max(CHUNK, CHUNK_BYTES // (vocab * dtype.itemsize))
    size = max(1, -(-count // max(1, -(-count // most))))
    buffer, total = _kept("logits", (min(size, count), -(-vocab // ROW) * ROW), dtype), 0.0
    # With AMX, oneDNN multiplies the column after an odd last one by 0, and 0 x NaN is NaN
    buffer[:, vocab:].zero_()
    buffer = buffer[:, :vocab]
    for begin in range(0, count, size):
        chunk = slice(begin, begin + size)
        part = rows[chunk]
        if in_kernel:
            logits = buffer[: len(part)]
            _C.linear_forward(part, narrow, None, logits, threads)
        else:
            logits = torch.mm(part, narrow.t(), out=buffer[: len(part)])  # autocast does not cast calls with `out`
        total += cross_entropy(logits, targets[chunk], need_x or need_weight)
        if in_kernel and need_x:
            _C.linear_backward(logits, None, narrow, grad_rows[chunk], None, None, None, threads)
        elif need_x:
            torch.mm(logits, narrow, out=grad_rows[chunk])
        if in_kernel and need_weight:
            _C.linear_backward(logits, part, None, None, grad_weight, None, scale, threads)
        elif need_weight:
            _add_product(grad_weight, logits, part, scale, first=begin == 0)
    grad_x = grad_rows.to(x.dtype).mul_(scale)
    if need_x and not everything:
        grad_x = torch.zeros_like(x).index_copy_(0, counted, grad_x)
    return torch.tensor(total * scale, dtype=torch.float32, device="cpu"), grad_x, grad_weight.to(weight.dtype)


_memory = threading.local()  # for each purpose: the last buffer of _kept, and a weak reference to its last use


def _kept(purpose: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, in the buffer of the last step for this purpose if no tensor uses it any more.

    The page faults of fresh memory take longer than the kernels need to write it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory, last_use = vars(_memory).get(purpose, (b"", None))
    if len(memory) < size or last_use() is not None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # one page fault for 2 MB instead of 512
    use = memoryview(memory)  # the tensor's storage keeps this alive
    vars(_memory)[purpose] = memory, weakref.ref(use)
    # resize_ instead of view: autograd accumulates in place only into tensors that are not views
    return torch.frombuffer(use, dtype=dtype, count=math.prod(shape)).resize_(shape)


def _add_product(grad_weight: Tensor, logits: Tensor, rows: Tensor, scale: float, first: bool) -> None:
    """Compute grad_weight += scale x logits.T @ rows in float32; `first` overwrites grad_weight instead."""
    if logits.dtype == torch.float32:
        grad_weight.addmm_(logits.t(), rows, beta=0 if first else 1, alpha=scale)
        return
    # PyTorch's 16-bit matmul has a 16-bit result; computed in blocks, it stays in the cache
    shape = min(VOCAB_BLOCK, len(grad_weight)), rows.shape[1]
    product, wide = (rows.new_empty(shape, dtype=dtype) for dtype in (rows.dtype, torch.float32))
    for block in grad_weight.split(VOCAB_BLOCK):
        logits, some = logits[:, len(block) :], logits[:, : len(block)]
        part = torch.mm(some.t(), rows, out=product[: len(block)])
        if first:
            block.copy_(part).mul_(scale)
        else:  # through float32: adding mixed dtypes would allocate a temporary
            block.add_(wide[: len(block)].copy_(part), alpha=scale)


# ---- cuda, triton: kernels/triton/cross_entropy.py, and PyTorch's matmuls --------------------------------------------


def _forward_triton(x: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute all rows: to leave out those whose targets do not count would synchronise."""
    dtype, ignore_index, need_x, need_weight = settings
    _C.check_storage((x, weight, targets))
    _check(x, weight, targets)
    kernels = native.triton_module("cross_entropy")
    vocab, count, targets = weight.shape[0], len(targets), targets.contiguous()
    rows, narrow = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
    stride = -(-vocab // ROW) * ROW
    most = max(CHUNK, GPU_CHUNK_BYTES // (stride * dtype.itemsize))
    size = max(1, -(-count // max(1, -(-count // most))))
    # Products over a number of columns that is not a multiple of ROW are slower: the last few have their own. They come
    # first, so that grad_x is rounded once with all its weight.
    parts = [slice(vocab - vocab % ROW, vocab), slice(0, vocab - vocab % ROW)]
    parts = [part for part in parts if part.stop > part.start]
    buffer = rows.new_empty(min(size, count), stride)
    losses = rows.new_empty(count, dtype=torch.float32)
    grad_rows = torch.empty_like(rows if need_x else rows[:0])
    product = torch.empty_like(narrow if need_weight else narrow[:0])
    total = (
        torch.zeros_like(product, dtype=torch.float32) if count == 0 else torch.empty_like(product, dtype=torch.float32)
    )
    for begin in range(0, count, size):
        chunk = slice(begin, begin + size)
        some, logits = rows[chunk], buffer[: len(rows[chunk])]
        for part in parts:
            torch.mm(some, narrow[part].t(), out=logits[:, part])  # autocast does not cast calls with `out`
        kernels.forward(logits, targets[chunk], losses[chunk], vocab, ignore_index, need_x or need_weight)
        if need_x:
            for part in parts:
                grad_rows[chunk].addmm_(logits[:, part], narrow[part], beta=int(part is not parts[0]))
        if need_weight:
            for part in parts:
                torch.mm(logits[:, part].t(), some, out=product[part])
            total = total.copy_(product) if begin == 0 else total.add_(product)  # of mixed dtypes: one kernel on a GPU
    loss, scale = (rows.new_empty((), dtype=torch.float32) for _ in range(2))
    kernels.mean(losses, targets, loss, scale, ignore_index)
    # 1 / count is applied to the sums: softmax / count would underflow in float16
    grad_x = torch.mul(grad_rows, scale, out=torch.empty_like(grad_rows, dtype=x.dtype))
    return loss, grad_x, torch.mul(total, scale, out=torch.empty_like(total, dtype=weight.dtype))


def _outputs(x: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_weight = settings[2:]
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if need_x else (0, x.shape[1])),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


# x is (rows, width). Returns the loss and its gradients; those that are not needed are empty.
_forward = native.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, ScalarType dtype, int ignore_index, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    native.compiled("cross_entropy", _forward_native, ["cpu"]) | dict.fromkeys(("cuda", "triton"), _forward_triton),
    _outputs,
)


class Settings(NamedTuple):
    """The arguments that are not tensors, and the gradients that are needed."""

    dtype: torch.dtype  # of the logits
    ignore_index: int
    need_x: bool
    need_weight: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def compute(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return _forward(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), *ctx.settings, ctx.backend)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, settings: Settings, backend: str) -> Tensor:
        ctx.shape, ctx.settings, ctx.backend = x.shape, settings, backend
        loss, *gradients = _LinearCrossEntropy.compute(ctx, x, weight, targets)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(x, weight, targets)
            ctx.gradients = gradients
        return loss

    @staticmethod
    @native.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            gradients = [gradient * grad_loss for gradient in ctx.saved_tensors]
        else:
            # Autograd may write into the gradients that it gets, so a second backward pass computes them again.
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                _, *gradients = _LinearCrossEntropy.compute(ctx, *ctx.saved_tensors)
            if native.is_batched(grad_loss):
                ctx.gradients = gradients
                gradients = [gradient * grad_loss for gradient in gradients]
            elif not grad_loss.is_cpu or grad_loss != 1:  # usually 1, and grad_weight is large
                gradients = [gradient.mul_(grad_loss) for gradient in gradients]
        grad_x, grad_weight = gradients
        return (
            grad_x.view(ctx.shape) if ctx.settings.need_x else None,
            grad_weight if ctx.settings.need_weight else None,
            None,
            None,
            None,
        )


def _with_kernel(
    backend: str, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, ignore_index: int
) -> Tensor:
    if backend == "cuda" and registry.BACKENDS["triton"].problem() is not None:
        return _linear_cross_entropy_torch(x, weight, targets, dtype, ignore_index)
    needs = (tensor.requires_grad and torch.is_grad_enabled() for tensor in (x, weight))
    args: Any = (x, weight, targets, Settings(dtype, ignore_index, *needs), backend)
    loss: Tensor = _LinearCrossEntropy.apply(*(native.distinct(args) if torch.compiler.is_compiling() else args))
    return loss


registry.register(
    Operation(
        "linear_cross_entropy",
        {
            **dict.fromkeys(("torch", "simt"), _linear_cross_entropy_torch),
            **{name: functools.partial(_with_kernel, name) for name in ("cpu", "cuda", "triton")},
        },
        samples=[
            Sample(
                "with ignored targets",
                linear_cross_entropy,
                {"x": (6, 8), "weight": (9, 8)},
                {"targets": torch.tensor([1, 2, -100, 0, 3, 4], device="cpu")},
            )
        ],
        first_use=lambda _: Sample(
            "first use",
            linear_cross_entropy,
            {"x": (70, 40), "weight": (777, 40)},
            {"targets": torch.tensor([-100 if i % 7 == 0 else 11 * i for i in range(70)], device="cpu")},
        ),
    )
)
