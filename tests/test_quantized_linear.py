"""ops.quantized_linear: blocks as gguf makes them, products against float64, the same bits in any batch, refusals."""

from __future__ import annotations

import math
import sys
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from grid import BF16, DTYPES, F16, F32, F64, check, covering, leaves, randn, running, threads
from torch import Tensor

from gptcore import _C, ops
from gptcore.ops import native, registry, verify
from gptcore.ops.quantized_linear import BLOCK, BYTES, dequantize, quantize

on_the_cpu = pytest.mark.parametrize("kernel", [f"cpu-{isa}" for isa in _C.supported_isas()], indirect=True)
kinds = pytest.mark.parametrize("kind", list(BYTES))
OTHERS = [name for name in ("triton",) if ops.backends()[name] is None]


def weights(rows: int, width: int, kind: str, scale: float = 0.1) -> Tensor:
    return quantize(randn(rows, width, seed=1, scale=scale), kind)


def rounded(x: Tensor) -> Tensor:
    """x as the CPU kernel rounds it: 8 bits in blocks of 32, with a float32 scale."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    most = blocks.abs().amax(-1, keepdim=True)
    whole = (blocks * torch.where(most == 0, 0.0, 127 / most)).round()
    return (whole.double() * (most / 127).double()).flatten(-2)


@kinds
def test_the_bytes_are_those_of_gguf(kind: str) -> None:
    """Of normal numbers, of blocks of zeros, of ties, and of the smallest and largest numbers of a float16 scale."""
    matrix = torch.cat([
        randn(40, 96), randn(4, 96, scale=1e-8), randn(4, 96, scale=1e4), torch.zeros(2, 96),
        (torch.arange(4 * 96).view(4, 96) % 255 - 127) / 2.0, -torch.ones(1, 96),
    ])  # fmt: skip
    packed = gguf.quants.quantize(matrix.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    ours = quantize(matrix, kind)
    assert np.array_equal(ours.numpy(), packed)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(dequantize(ours, kind).numpy(), theirs)


@on_the_cpu
@kinds
def test_it_equals_the_formula_of_the_rounded_input(kernel: str, kind: str) -> None:
    for axes in covering(
        shape=[(), (1,), (3,), (7,), (13,), (2, 5), (300,)], blocks=[1, 2, 8, 9, 17],
        outer=[1, 3, 4, 8, 17, 31, 33, 65], bias=[None, "same", F32], dtype=list(DTYPES),
    ):  # fmt: skip
        dtype, inner, outer = axes["dtype"], axes["blocks"] * BLOCK, axes["outer"]
        x, weight = randn(*axes["shape"], inner, dtype=dtype), weights(outer, inner, kind)
        bias = None if axes["bias"] is None else randn(outer, dtype=dtype if axes["bias"] == "same" else F32)
        out = ops.quantized_linear(x, weight, kind, bias, backend=kernel)
        exact = rounded(x) @ dequantize(weight, kind, F64).t() + (0 if bias is None else bias.double())
        assert out.dtype == dtype
        check(f"{axes}", out, exact, exact.to(dtype), condition=math.sqrt(inner))
        # And what rounding adds: half a step of the largest of 32
        whole = x.double() @ dequantize(weight, kind, F64).t() + (0 if bias is None else bias.double())
        assert (exact - whole).norm() <= 0.008 * (x.double().norm() * weight_norm(weight, kind) + 1e-9)


def weight_norm(weight: Tensor, kind: str) -> Tensor:
    return dequantize(weight, kind, F64).norm()


@pytest.mark.parametrize("backend", OTHERS)
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_equals_the_formula(backend: str, kind: str, dtype: torch.dtype) -> None:
    for rows, inner, outer in ((1, 32, 5), (70, 96, 70), (16, 320, 64)):
        x, weight, bias = randn(rows, inner, dtype=dtype), weights(outer, inner, kind), randn(outer, dtype=dtype)
        out = ops.quantized_linear(x, weight, kind, bias, backend=backend)
        exact = x.double() @ dequantize(weight, kind, F64).t() + bias.double()
        check(f"{rows} {inner} {outer}", out, exact, exact.to(dtype), condition=math.sqrt(inner))


@on_the_cpu
@kinds
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(kernel: str, kind: str) -> None:
    x, weight, bias = randn(300, 320), weights(70, 320, kind), randn(70)
    whole, out = torch.empty(300, 70), torch.empty(300, 70)
    _C.quantized_linear_forward(x, weight, kind, bias, whole, 1)
    for rows in (*range(1, 65), 255, 257, 300):
        for count in (1, 2, 4):
            _C.quantized_linear_forward(x[-rows:], weight, kind, bias, out[:rows].fill_(math.nan), count)
            assert torch.equal(out[:rows], whole[-rows:]), (rows, count)


def test_q8_0_has_the_same_bits_on_every_instruction_set_with_fma() -> None:
    """Integers are exact, and floats are added in the same order."""
    x, weight, found = randn(5, 320), weights(70, 320, "q8_0"), []
    for isa in _C.supported_isas():
        if isa != "baseline":
            with running(f"cpu-{isa}"):
                found.append(ops.quantized_linear(x, weight, "q8_0", backend="cpu"))
    assert all(torch.equal(other, found[0]) for other in found)


@on_the_cpu
def test_extreme_bytes(kernel: str) -> None:
    """Numbers of -128, which no quantizer makes, all products of the same sign, and every 4-bit number."""
    block = np.concatenate([np.float16([1.0]).view(np.uint8), np.full(32, 0x80, np.uint8)])
    weight = torch.from_numpy(block).repeat(20, 3)
    for x in (torch.ones(7, 96), -torch.ones(7, 96)):
        assert torch.equal(
            ops.quantized_linear(x, weight, "q8_0", backend="cpu"), (x.sum(1) * -128)[:, None].expand(7, 20)
        )
    block = np.concatenate([np.float16([1.0]).view(np.uint8), np.arange(16, dtype=np.uint8) * 17])
    weight, x = torch.from_numpy(block).repeat(5, 1), torch.eye(32)
    out = ops.quantized_linear(x, weight, "q4_0", backend="cpu")
    assert torch.equal(out, (torch.arange(32.0) % 16 - 8)[:, None].expand(32, 5))


@on_the_cpu
def test_what_is_not_finite_stays_in_its_row(kernel: str) -> None:
    x, weight = randn(6, 64), weights(9, 64, "q8_0")
    x[1, 3], x[2, 40], x[4] = math.nan, math.inf, 0
    x[5] *= 1e-42 / 3
    out = ops.quantized_linear(x, weight, "q8_0", backend="cpu")
    assert not out[1:3].isfinite().any()
    assert out[[0, 3]].isfinite().all()
    assert not out[4:].any()


@on_the_cpu
@kinds
def test_neighbours_in_memory_are_neither_read_nor_written(kernel: str, kind: str) -> None:
    for rows, inner, outer in ((5, 64, 33), (1, 32, 3), (9, 288, 16)):
        packed = weights(outer, inner, kind)
        room = torch.full((packed.numel() + 128,), 0xFF, dtype=torch.uint8)  # a scale of 0xffff is NaN
        weight = room[64:-64].view(packed.shape).copy_(packed)
        x_room = torch.full((rows * inner + 128,), math.nan)
        x = x_room[64:-64].view(rows, inner).copy_(randn(rows, inner))
        out_room = torch.full((rows * outer + 128,), math.nan)
        out = out_room[64:-64].view(rows, outer)
        _C.quantized_linear_forward(x, weight, kind, None, out, 2)
        assert not out.isnan().any()
        assert out_room[:64].isnan().all()
        assert out_room[-64:].isnan().all()


@pytest.mark.parametrize("decoded", [2**22, 1])
@pytest.mark.parametrize("backend", ["torch", "cpu", *OTHERS])
@kinds
def test_gradients_of_input_and_bias(backend: str, kind: str, decoded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a weight that is decoded at once, and one column of blocks after the other."""
    monkeypatch.setattr(sys.modules[quantize.__module__], "DECODED", decoded)
    x, bias = leaves(randn(2, 5, 64), randn(9))
    weight = weights(9, 64, kind)
    grad_out = randn(2, 5, 9, seed=3)
    ops.quantized_linear(x, weight, kind, bias, backend=backend).backward(grad_out)
    torch.testing.assert_close(x.grad, grad_out @ dequantize(weight, kind))
    torch.testing.assert_close(bias.grad, grad_out.sum((0, 1)))
    frozen = ops.quantized_linear(x.detach(), weight, kind, bias.detach(), backend=backend)
    assert not frozen.requires_grad


@pytest.mark.parametrize("backend", ["torch", "cpu", *OTHERS])
def test_a_storage_that_was_resized_is_refused(backend: str) -> None:
    tensors = [randn(5, 64), weights(9, 64, "q8_0"), randn(9)]
    for i, tensor in enumerate(tensors):
        cut = tensor.clone()
        cut.untyped_storage().resize_(tensor.nbytes - 1)
        x, weight, bias = (cut if j == i else other for j, other in enumerate(tensors))
        with pytest.raises(ValueError, match="storage was resized"):
            ops.quantized_linear(x, weight, "q8_0", bias, backend=backend)
    (x,) = leaves(tensors[0])
    out = ops.quantized_linear(x, cut := tensors[1], "q8_0", backend=backend)
    cut.untyped_storage().resize_(0)
    if backend != "torch":  # whose graph keeps the decoded weight
        with pytest.raises(ValueError, match="storage was resized"):
            out.sum().backward()


def test_backends_without_a_kernel_run_the_formula() -> None:
    x, weight, bias = randn(5, 64), weights(9, 64, "q4_0"), randn(9)
    expected = ops.quantized_linear(x, weight, "q4_0", bias, backend="torch")
    with ops.use("simt"):
        assert torch.equal(ops.quantized_linear(x, weight, "q4_0", bias), expected)
    with ops.use("cpu"):
        assert not torch.equal(ops.quantized_linear(x, weight, "q4_0", bias), expected)
    assert torch.equal(
        ops.quantized_linear(x.double(), weight, "q4_0"), x.double() @ dequantize(weight, "q4_0", F64).t()
    )


def test_the_first_use_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = registry.OPERATIONS["quantized_linear"]
    sample = operation.first_use(0)  # type: ignore[misc]
    for name in OTHERS:
        assert verify._compare(name, sample, torch.empty(0)) is None
    monkeypatch.setattr(native.triton_module("quantized_linear"), "forward", lambda *args: args[-1].fill_(1.0))
    assert "relative error" in str(verify._compare("triton", sample, torch.empty(0)))


@kinds
def test_it_compiles_into_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    x, weight, bias = randn(3, 64), weights(9, 64, kind), randn(9)
    compiled = torch.compile(ops.quantized_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, kind, bias), ops.quantized_linear(x, weight, kind, bias))
    torch.library.opcheck(torch.ops.gptcore.quantized_linear.default, (x, weight, bias, kind, "cpu"))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_many_dimensions_and_none(dtype: torch.dtype) -> None:
    weight = weights(9, 32, "q8_0")
    x = randn(2, *[1] * 8, 32, dtype=dtype)
    out = ops.quantized_linear(x, weight, "q8_0")
    assert torch.equal(out.view(2, 9), ops.quantized_linear(x.view(2, 32), weight, "q8_0"))
    assert ops.quantized_linear(x[:0], weight, "q8_0").shape == (0, *[1] * 8, 9)
    with threads(2):
        assert torch.equal(ops.quantized_linear(x.transpose(0, 3), weight, "q8_0").view(2, 9), out.view(2, 9))
    bias, none = randn(3), torch.empty(3, 0, dtype=torch.uint8)
    assert torch.equal(ops.quantized_linear(randn(2, 0), none, "q8_0", bias, backend="cpu"), bias.expand(2, 3))


def test_arguments_that_do_not_fit() -> None:
    x, weight, bias = randn(4, 64), weights(9, 64, "q8_0"), randn(9)

    def refused(error: type[Exception], match: str, *args: Any) -> None:
        with pytest.raises(error, match=match):
            ops.quantized_linear(*args)

    refused(TypeError, "x is a list", [1.0], weight, "q8_0")
    refused(ValueError, "kind is 'q5_0', expected one of: q8_0, q4_0", x, weight, "q5_0")
    refused(ValueError, r"weight is torch.uint8 of shape \(9, 68\), expected .* blocks of 18 bytes", x, weight, "q4_0")
    refused(ValueError, "weight is torch.int8", x, weight.view(torch.int8), "q8_0")
    refused(ValueError, r"x is torch.float32 of shape \(4, 63\), expected .* \(..., 64\)", x[:, :63], weight, "q8_0")
    refused(
        ValueError, r"bias is torch.float16 of shape \(9,\), expected torch.float32", x, weight, "q8_0", bias.half()
    )
    refused(ValueError, "weight is on meta, expected cpu", x, weight.to("meta"), "q8_0")
    with pytest.raises(ValueError, match="width is a multiple of 32"):
        quantize(randn(3, 33), "q8_0")
    for kind, largest in (("q8_0", 1e7), ("q4_0", 1e6)):
        with pytest.raises(ValueError, match=f"is too large for {kind}"):
            quantize(torch.full((1, 32), largest), kind)


def test_native_arguments_that_do_not_fit() -> None:
    x, weight, bias, out = randn(4, 64), weights(9, 64, "q8_0"), randn(9), torch.empty(4, 9)

    def refused(match: str, *args: Any) -> None:
        with pytest.raises(ValueError, match=match):
            _C.quantized_linear_forward(*args)

    refused("kind is q8", x, weight, "q8", bias, out, 1)
    refused(r"weight has shape \(9, 68\), expected \(out_features, blocks x 18\)", x, weight, "q4_0", bias, out, 1)
    refused("weight is torch.int64", x, weight.long(), "q8_0", bias, out, 1)
    refused(r"x has shape \(4, 32\), expected rows of 64", x[:, :32].contiguous(), weight, "q8_0", bias, out, 1)
    refused("x is not contiguous", randn(64, 4).t(), weight, "q8_0", bias, out, 1)
    refused(r"out has shape \(3, 9\), expected 4 rows of 9", x, weight, "q8_0", bias, out[:3], 1)
    refused(r"bias has shape \(8\), expected \(9\)", x, weight, "q8_0", bias[:8], out, 1)
    refused("out is torch.float64", x, weight, "q8_0", bias, out.double(), 1)
    refused("out shares memory with bias", x, weight, "q8_0", out[0], out, 1)
    refused("num_threads is 0", x, weight, "q8_0", bias, out, 0)
