"""Single operations, against PyTorch's, and against the limit that bounds each: compute or memory.

FLOPs count the matrix products of the causal half only. Bytes count each input and output tensor once; recomputation
and intermediate tensors do not count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import PYTORCH, name_of, pick, reference
from gptcore import _C, ops
from gptcore.ops.attention import Settings
from gptcore.ops.quantized_linear import BYTES, quantize
from gptcore.ops.registry import OPERATIONS

Compare = Callable[..., None]
DTYPES = [torch.float32, torch.bfloat16]
HEADS = pick(2, 12)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def forward_backward(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Callable[[], Any]:
    def run() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return torch.autograd.grad(outputs, inputs, grads)

    return run


@pytest.mark.parametrize("S", pick([16], [256, 1024, 2048, 4096]))
@pytest.mark.parametrize("D", pick([64], [64, 128]))
@dtypes
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def bench_attention(backward: bool, dtype: torch.dtype, D: int, S: int, compare: Compare) -> None:
    shape = (1, HEADS, S, D)
    sdpa: Callable[..., Tensor] = reference(F.scaled_dot_product_attention)
    inputs = [torch.randn(shape).to(dtype).requires_grad_(backward) for _ in range(3)]
    flops = 4 * HEADS * D * S * (S + 1) / 2  # QK^T and PV: 2 FLOPs each per query, key and dimension
    elements = math.prod(shape)
    if backward:  # dV, dP, dQ, dK and the recomputed scores
        flops *= 3.5
        grad = torch.randn(shape).to(dtype)
        ours = forward_backward(ops.attention, inputs, [grad])
        theirs = forward_backward(lambda q, k, v: sdpa(q, k, v, is_causal=True), inputs, [grad])
    else:
        ours, theirs = lambda: ops.attention(*inputs), lambda: sdpa(*inputs, is_causal=True)
    compare(
        f"attention {'forward + backward' if backward else 'forward'} {name_of(dtype)}", f"D={D} S={S}", ours, theirs,
        against=PYTORCH, limit=measure.matmul(measure.operand(dtype)), flops=flops,
        bytes=(4 + 8 * backward) * elements * dtype.itemsize, extra={"D": D, "S": S},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "S"), pick([(DTYPES[1], 16)], [(DTYPES[0], 256), *((DTYPES[1], S) for S in (256, 1024, 2048, 4096))])
)
@pytest.mark.parametrize("D", pick([64], [64, 128]))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def bench_attention_without_matmuls(backward: bool, D: int, dtype: torch.dtype, S: int, compare: Compare) -> None:
    """Time the same scores with head_dim 2, whose matmuls take almost no time: the ratio is the share of the rest."""

    def run(head_dim: int) -> Callable[[], Any]:
        inputs = [torch.randn(1, HEADS, S, head_dim).to(dtype).requires_grad_(backward) for _ in "qkv"]
        if not backward:
            return lambda: ops.attention(*inputs)
        return forward_backward(ops.attention, inputs, [torch.randn_like(inputs[0])])

    compare(
        f"attention without its matmuls, {'forward + backward' if backward else 'forward'} {name_of(dtype)}",
        f"D={D} S={S}", run(D), run(2), against="the same with head_dim 2",
    )  # fmt: skip


@pytest.mark.parametrize("S", pick([16], [256, 1024, 4096]))
@dtypes
def bench_attention_matmuls(dtype: torch.dtype, S: int, compare: Compare) -> None:
    """Time attention without a mask against its two matmuls alone: the ratio is below 1 by the cost of softmax.

    torch.bmm writes both results into preallocated buffers.
    """
    D = 64
    q, k, v = (torch.randn(HEADS, S, D).to(dtype) for _ in range(3))
    scores, out = torch.empty(HEADS, S, S, dtype=dtype), torch.empty_like(q)

    def matmuls() -> None:
        torch.bmm(q, k.transpose(1, 2), out=scores)
        torch.bmm(scores, v, out=out)

    compare(
        f"attention against its matmuls {name_of(dtype)}", f"D={D} S={S}, no mask",
        lambda: ops.attention(q[None], k[None], v[None], causal=False), matmuls,
        against="torch.bmm alone", limit=measure.matmul(measure.operand(dtype)), flops=4 * HEADS * D * S * S,
        bytes=4 * q.nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("batch", pick([2], [1, 16]))
@dtypes
def bench_decode(dtype: torch.dtype, batch: int, compare: Compare) -> None:
    """Time one query against 1024 keys, in enough layers that keys and values do not fit in a cache."""
    D, keys = 64, pick(32, 1024)
    one = 2 * batch * HEADS * keys * D * dtype.itemsize
    layers = math.ceil(pick(1, 2**27) / one)
    sdpa: Callable[..., Tensor] = reference(F.scaled_dot_product_attention)
    q = torch.randn(batch, HEADS, 1, D).to(dtype)
    kv = [[torch.randn(batch, HEADS, keys, D).to(dtype) for _ in "kv"] for _ in range(layers)]
    compare(
        f"attention decode {name_of(dtype)}", f"batch {batch}, {keys} keys, {layers} layers",
        lambda: [ops.attention(q, k, v) for k, v in kv], lambda: [sdpa(q, k, v) for k, v in kv],
        against=PYTORCH, limit=measure.read(), bytes=layers * one, flops=layers * 4 * batch * HEADS * keys * D,
    )  # fmt: skip


@dtypes
def bench_decode_native(dtype: torch.dtype, compare: Compare) -> None:
    """Time the native function alone against `ops.attention`: the difference is the Python overhead of a call."""
    keys = pick(32, 1024)
    one = 2 * HEADS * keys * 64 * dtype.itemsize
    layers = math.ceil(pick(1, 2**27) / one)
    q, out, lse = (
        torch.randn(1, HEADS, 1, 64).to(dtype),
        torch.empty(1, HEADS, 1, 64).to(dtype),
        torch.empty(1, HEADS, 1),
    )
    kv = [[torch.randn(1, HEADS, keys, 64).to(dtype) for _ in "kv"] for _ in range(layers)]
    settings, threads = Settings(scale=0.125), torch.get_num_threads()

    def ours() -> None:
        for k, v in kv:
            _C.attention_forward(q, k, v, out, lse, settings, threads)

    compare(
        f"attention decode, native function alone {name_of(dtype)}", f"batch 1, {keys} keys, {layers} layers",
        ours, lambda: [ops.attention(q, k, v) for k, v in kv],
        against="ops.attention", limit=measure.read(), bytes=layers * one,
    )  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("op", [name for name, operation in OPERATIONS.items() if operation.counterpart])
def bench_call(op: str, backward: bool, compare: Compare) -> None:
    """Time calls on tiny tensors: the time is the overhead of a call."""
    operation = OPERATIONS[op]
    (sample,) = (sample for sample in operation.samples if sample.name == "plain")
    inputs = [tensor.requires_grad_(backward) for tensor in sample.tensors()]
    calls: Any = sample.call, operation.counterpart
    if backward:
        runs = [forward_backward(call, inputs, [torch.ones_like(call(*inputs))]) for call in calls]
    else:
        runs = [functools.partial(call, *inputs) for call in calls]
    compare(f"call overhead of {op}", f"forward{' + backward' * backward}, tiny tensors", *runs, against="PyTorch")


@dtypes
def bench_gelu(dtype: torch.dtype, compare: Compare) -> None:
    shape = pick((16, 64), (4096, 3072))
    gelu = reference(F.gelu)
    x, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    compare(
        f"GELU forward + backward {name_of(dtype)}", "tanh, {} x {}".format(*shape),
        forward_backward(ops.gelu, [x], [grad]), forward_backward(lambda x: gelu(x, approximate="tanh"), [x], [grad]),
        against=PYTORCH, limit=measure.copy(), bytes=5 * x.nbytes, flops=30 * x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("rows", pick([16], [4096, 128]))
@dtypes
def bench_gelu_in_place(dtype: torch.dtype, rows: int, compare: Compare) -> None:
    """Time the kernels with preallocated outputs: bench_gelu takes longer by the page faults of fresh memory.

    128 rows stay in the cache, so their time is arithmetic.
    """
    shape = rows, pick(64, 3072)
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    out, grad_x, threads = torch.empty_like(x), torch.empty_like(x), torch.get_num_threads()

    def ours() -> None:
        _C.gelu_forward(x, None, out, True, threads)
        _C.gelu_backward(grad, x, None, grad_x, None, True, threads)

    def theirs() -> None:
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad_x)

    compare(
        f"GELU into preallocated outputs {name_of(dtype)}", "tanh, {} x {}".format(*shape), ours, theirs,
        against="PyTorch", limit=measure.copy(), bytes=5 * x.nbytes, flops=30 * x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@dtypes
def bench_layer_norm(dtype: torch.dtype, residual: bool, compare: Compare) -> None:
    """Time layer norm; with a residual, residual_out is a second output with a gradient, as in a transformer."""
    shape = pick((16, 64), (4096, 768))
    norm = reference(F.layer_norm)
    x, y, grad, grad_residual = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = torch.rand(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype)
    inputs = [tensor.requires_grad_() for tensor in ([x, weight, bias, y] if residual else [x, weight, bias])]
    if residual:
        ours = forward_backward(lambda x, w, b, y: ops.layer_norm(x, w, b, residual=y), inputs, [grad, grad_residual])
        theirs = forward_backward(
            lambda x, w, b, y: (norm(s := x + y, s.shape[1:], w, b), s), inputs, [grad, grad_residual]
        )
    else:
        ours = forward_backward(ops.layer_norm, inputs, [grad])
        theirs = forward_backward(lambda x, w, b: norm(x, x.shape[1:], w, b), inputs, [grad])
    compare(
        f"layer norm{' with residual' * residual} forward + backward {name_of(dtype)}", "{} x {}".format(*shape),
        ours, theirs, against=PYTORCH, limit=measure.copy(), bytes=(8 if residual else 5) * x.nbytes,
        flops=20 * x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("rows", pick([16], [4096, 512]))
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@dtypes
def bench_layer_norm_in_place(dtype: torch.dtype, residual: bool, rows: int, compare: Compare) -> None:
    """Time the kernels with preallocated outputs against `ops.layer_norm`, which allocates them.

    512 rows stay in the cache, so their time is arithmetic.
    """
    rows, width = shape = rows, pick(64, 768)
    x, y, grad, grad_residual, out, total, grad_x = (torch.randn(shape).to(dtype) for _ in range(7))
    weight, bias, grad_weight, grad_bias = (torch.rand(width) for _ in range(4))
    mean, rstd, threads = torch.empty(rows), torch.empty(rows), torch.get_num_threads()
    inputs = [tensor.clone().requires_grad_() for tensor in ([x, weight, bias, y] if residual else [x, weight, bias])]

    def ours() -> None:
        added = (y, total) if residual else (None, None)
        _C.layer_norm_forward(x, added[0], weight, bias, out, added[1], mean, rstd, 1e-5, threads)
        grads = (grad, grad_residual if residual else None)
        _C.layer_norm_backward(*grads, x, weight, mean, rstd, grad_x, None, grad_weight, grad_bias, threads)

    if residual:
        call = forward_backward(lambda x, w, b, y: ops.layer_norm(x, w, b, residual=y), inputs, [grad, grad_residual])
    else:
        call = forward_backward(ops.layer_norm, inputs, [grad])
    compare(
        f"layer norm{' with residual' * residual} into preallocated outputs {name_of(dtype)}", f"{rows} x {width}",
        ours, call, against="ops.layer_norm", limit=measure.copy(), bytes=(8 if residual else 5) * x.nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("shape", pick([(16, 32, 64)], [(768, 128, 512), (1024, 768, 3072)]), ids=str)
def bench_linear(shape: tuple[int, int, int], compare: Compare) -> None:
    """Time a linear layer under autocast with float32 weights, as in training: the only case with our own kernel."""
    rows, inner, outer = shape
    x, grad = torch.randn(rows, inner).bfloat16(), torch.randn(rows, outer).bfloat16()
    inputs = [tensor.requires_grad_() for tensor in (x, torch.randn(outer, inner), torch.randn(outer))]

    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    ours, theirs = (forward_backward(autocast(linear), inputs, [grad]) for linear in (ops.linear, reference(F.linear)))
    compare(
        "linear layer forward + backward bfloat16 autocast", f"{rows} x {inner} to {outer}", ours, theirs,
        against=PYTORCH, limit=measure.matmul(measure.operand(torch.bfloat16)), flops=6 * rows * inner * outer,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["memory", "the cache"])
@pytest.mark.parametrize("rows", pick([1], [1, 2, 4, 8, 16]))
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", *BYTES])
@torch.no_grad()
def bench_few_rows(kind: str, rows: int, place: str, compare: Compare) -> None:
    """Multiply few rows by matrices larger than all caches, or by one that stays there: the arithmetic alone.

    The limit is reading the weights once, or multiplying in the type that the instruction set multiplies: with 8 rows
    and more, this takes longer in some types.
    """
    inner, outer = pick((32, 16), (768, 3072 if place == "memory" else 512))
    dtype = torch.float32 if kind in BYTES else getattr(torch, kind)
    weight = torch.randn(outer, inner).to(dtype)
    packed = quantize(weight, kind) if kind in BYTES else weight
    copies = packed.repeat(math.ceil(pick(1, 2**27) / packed.nbytes) if place == "memory" else 1, 1, 1)
    x, out, threads = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype), torch.get_num_threads()

    def ours() -> None:
        for matrix in copies:
            if kind in BYTES:
                _C.quantized_linear_forward(x, matrix, kind, None, out, threads)
            else:
                _C.linear_forward(x, matrix, None, out, threads)

    plain = weight.expand(len(copies), -1, -1) if kind in BYTES else copies

    def theirs() -> None:
        for matrix in plain:
            F.linear(x, matrix)

    arithmetic = measure.integer_matmul() if kind in BYTES else measure.matmul(measure.operand(dtype))
    flops = 2 * rows * inner * outer * len(copies)
    compare(
        f"linear layer of few rows, weights in {place}, {kind}", f"{rows} x {inner} to {outer}", ours, theirs,
        against=f"{PYTORCH}, {'float32 in the cache' if kind in BYTES else kind}",
        limit=measure.Slower(arithmetic, copies.nbytes, flops), bytes=copies.nbytes, flops=flops,
    )  # fmt: skip


def shape_of(name: str) -> tuple[int, int]:
    return pick((16, 64), (4096, 3072) if name == "GELU" else (4096, 768))


def memory_bound(name: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Return forward and backward of a memory-bound operation, on its own tensors."""
    shape = shape_of(name)
    x, y, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    inputs = [x] if name == "GELU" else [x, torch.rand(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype)]
    run: Callable[..., Any] = ops.gelu if name == "GELU" else ops.layer_norm
    grads = [grad]
    if name == "layer norm with residual":
        run, inputs, grads = (lambda x, w, b, y: ops.layer_norm(x, w, b, residual=y)), [*inputs, y], [grad, y]
    return forward_backward(run, [tensor.requires_grad_() for tensor in inputs], grads)


def run_child(pipe: Connection, kept: bool) -> None:
    """Run operations in a child process, because malloc's treatment of freed memory is a setting of the process."""
    if kept:
        measure.keep_freed_memory()
    runs: dict[Any, Callable[[], Any]] = {}
    while (case := pipe.recv()) is not None:
        if case not in runs:
            runs = {case: memory_bound(*case)}
        runs[case]()
        pipe.send(None)


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Connection]]:
    """Yield pipes to two child processes: one keeps freed memory, the other has malloc's defaults."""
    context, pipes = measure.PROCESSES, []
    for kept in (True, False):
        ours, theirs = context.Pipe()
        context.Process(target=run_child, args=(theirs, kept), daemon=True).start()
        pipes.append(ours)
    yield pipes
    for pipe in pipes:
        pipe.send(None)


@pytest.mark.parametrize("name", pick(["GELU"], ["GELU", "layer norm with residual"]))
@dtypes
def bench_kept_memory(dtype: torch.dtype, name: str, processes: list[Connection], compare: Compare) -> None:
    """Time the cost of returning freed memory to the system, which clears it before it is used again."""
    shape, tensors = shape_of(name), 8 if name.endswith("residual") else 5
    kept, usual = (lambda pipe=pipe: (pipe.send((name, dtype)), pipe.recv()) for pipe in processes)
    compare(
        f"{name}, malloc keeps freed memory {name_of(dtype)}", "forward + backward, {} x {}".format(*shape), kept,
        usual, against="malloc returns freed memory", limit=measure.copy(),
        bytes=tensors * math.prod(shape) * dtype.itemsize,
    )  # fmt: skip
