"""Triton's interpreter, faster and stricter: a module that imports the fixture runs all its tests so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor


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
    """Change the interpreter in four ways.

    It patches triton.language at each call of each function, half of its time: here once a launch. It makes a table of
    dtypes for each tensor, a tenth: here it is asked once for each dtype. It reads and writes any address: here only
    within the tensors that the kernel was given. And its dot is NumPy's, whose Q K^T and (K Q^T)^T differ with some
    BLAS: here every sum runs in the order of k, on every CPU.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}
    patched: set[int] = set()
    tensors: list[tuple[int, int]] = []

    def numpy_dtype_once(dtype: Any) -> Any:
        if (name := dtype.scalar.name) not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(dtype)
        return numpy_dtypes[name]

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
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
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_dtype_once)
        monkeypatch.setattr(builder, "create_dot", dot_in_order)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        monkeypatch.setattr(builder, "create_masked_load", checked_load)
        monkeypatch.setattr(builder, "create_masked_store", checked_store)
        yield
