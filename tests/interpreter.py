"""Triton's interpreter, faster and stricter: a module that imports the fixture runs all its tests so."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from gptcore import ops


def extents(arguments: Iterable[Any]) -> list[tuple[int, int]]:
    """[begin, end) in memory of all tensors among the arguments of a kernel."""
    found = []
    for argument in arguments:
        if isinstance(argument, tuple):
            found += extents(argument)
        elif isinstance(argument, Tensor) and argument.numel():
            last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
            begin = argument.data_ptr()
            found.append((begin, begin + (last + 1) * argument.element_size()))
    return found


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Change the interpreter in seven ways.

    It patches triton.language at each call of each function, half of its time: here once. It computes whether integers
    overflow and ignores the result, a third of the rest: here it does not. It makes a table of dtypes and the shape for
    each tensor: here once for each dtype and shape. It converts bfloat16 to float32 by its fields: here by a shift. It
    reads and writes any address: here only within the tensors that the kernel was given. And its dot is NumPy's, whose
    Q K^T and (K Q^T)^T differ with some BLAS: here every sum runs in the order of k, on every CPU.
    """
    if ops.backends()["triton"] is not None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}
    convert = interpreter._convert_float
    patched: dict[tuple[Any, Any], Any] = {}  # by the modules that a function may call
    tensors: list[tuple[int, int]] = []

    def numpy_dtype_once(dtype: Any) -> Any:
        if (name := dtype.scalar.name) not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(dtype)
        return numpy_dtypes[name]

    def patch_once(function: Any) -> Any:
        languages = function.__globals__.get("tl"), function.__globals__.get("core")
        if languages not in patched:
            patched[languages] = patch(function)
        return interpreter._LangPatchScope()  # restores nothing

    @functools.cache
    def shape_of(*sizes: int) -> tuple[Any, Any]:
        return core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shape_of(*(type.shape if type.is_block() else ()))

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) == ("bf16", "fp32"):
            return values.astype(np.uint32) << 16
        return convert(values, source, target, rounding)

    def launch_with_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors[:] = extents(args)
        return launch(self, *args, **kwargs)

    def check(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        if addresses.size:
            first, end = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            assert any(begin <= first and end <= tensor_end for begin, tensor_end in tensors), "outside of every tensor"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def dot_in_order(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        acc, product = np.zeros(total.data.shape, np.float32), np.empty(total.data.shape, np.float32)
        for column, row in zip(a.data.T, b.data, strict=True):
            acc += np.multiply(column[:, None], row, out=product)
        return interpreter.TensorHandle(acc + total.data, total.dtype.scalar)

    with pytest.MonkeyPatch.context() as monkeypatch:
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_dtype_once)
        monkeypatch.setattr(builder, "create_dot", dot_in_order)
        monkeypatch.setattr(interpreter, "_convert_float", convert_float)
        monkeypatch.setattr(core.tensor, "__init__", tensor_init)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_with_tensors)
        monkeypatch.setattr(builder, "create_masked_load", checked_load)
        monkeypatch.setattr(builder, "create_masked_store", checked_store)
        yield
        for scope in reversed(patched.values()):
            scope.restore()
