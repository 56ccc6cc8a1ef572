"""Memory that is not what a tensor says: storages that were resized, and subclasses that lie."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_native_calls import GOOD_REFUSALS, Named, call, calls, replaced, tensors_in

from gptcore import _C, ops
from gptcore.training.optim import AdamW


def behind(t: torch.Tensor) -> torch.Tensor:
    """The same numbers at the end of a larger storage."""
    return torch.cat((t.new_zeros(64), t.flatten()))[64:].view(t.shape)


@pytest.mark.parametrize("size", [0, 1, -1], ids=["to nothing", "to one byte", "by one byte"])
@pytest.mark.parametrize("name", calls())
def test_a_storage_that_was_resized_is_refused(name: str, size: int) -> None:
    arguments = calls()[name]
    for place, value in tensors_in(arguments).items():
        for kind in (torch.Tensor, Named):
            cut = behind(value).as_subclass(kind)  # type: ignore[arg-type]
            storage = cut.untyped_storage()
            storage.resize_(storage.nbytes() - 1 if size < 0 else size)
            with pytest.raises(ValueError, match=r"storage, which has \d+: the storage was resized"):
                call(name, replaced(arguments, place, cut))


@pytest.mark.parametrize("name", calls())
def test_numbers_stored_negated_are_refused(name: str) -> None:
    arguments = calls()[name]
    for place, value in tensors_in(arguments).items():
        if value.is_floating_point():
            for negated in (torch._neg_view(value), torch._neg_view(value).as_subclass(Named)):  # type: ignore[arg-type]
                with pytest.raises(ValueError, match=r"negative bit is set; call .resolve_neg\(\)"):
                    call(name, replaced(arguments, place, negated))


class Liar(torch.Tensor):
    """Says of itself what is not so."""

    shape = torch.Size((10**6, 10**6))  # type: ignore[assignment]
    dtype, is_cpu, is_cuda = torch.float64, False, True  # type: ignore[assignment]

    def stride(self, *_: Any) -> Any:
        return (10**9, 10**9)

    def data_ptr(self) -> int:
        return 1 << 40

    def get_device(self) -> int:
        return 7

    def is_neg(self) -> bool:
        return True

    def untyped_storage(self) -> Any:
        raise AssertionError

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return 1 << 40


@pytest.mark.parametrize("name", calls())
def test_a_subclass_cannot_lie_about_its_memory(name: str) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        for place, value in tensors_in(calls()[name]).items():
            arguments = replaced(calls()[name], place, value.as_subclass(Liar))  # type: ignore[arg-type]
            with torch.enable_grad():
                call(name, arguments)


@pytest.mark.parametrize("backend", ["cpu", "simt", "triton", "torch"])
def test_operations_on_memory_that_is_not_there_raise(backend: str) -> None:
    if ops.backends()[backend] is not None:
        pytest.skip(str(ops.backends()[backend]))

    class Wide(torch.Tensor):
        @property
        def shape(self) -> torch.Size:  # type: ignore[override]
            return torch.Size((*super().shape[:-2], 10**6, super().shape[-1]))

    q, row = torch.randn(2, 4, 6, 8), torch.ones(8)
    for run in (
        lambda t: ops.attention(q, t, q, backend=backend),
        lambda t: ops.attention(t, q, q, backend=backend),
        lambda t: ops.layer_norm(t, row, backend=backend),
        lambda t: ops.gelu(t, bias=row, backend=backend),
    ):
        with contextlib.suppress(*GOOD_REFUSALS):
            run(q.as_subclass(Wide))  # type: ignore[arg-type]
        cut = behind(q)
        cut.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="storage was resized"):
            run(cut)
        if backend != "torch":  # whose functions take it
            with pytest.raises(ValueError, match="negative bit is set"):
                run(torch._neg_view(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pytorch_never_gets_a_storage_that_was_resized(dtype: torch.dtype) -> None:
    """Its own functions, F.linear among them, crash on it."""
    row, matrix, targets = torch.ones(8, dtype=dtype), torch.ones(9, 8, dtype=dtype), torch.zeros(6, dtype=torch.long)
    kinds: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t,
        torch.nn.Parameter,
        lambda t: behind(t).as_subclass(Named),  # type: ignore[arg-type]
    ]
    for i, kind in enumerate(kinds):
        for shape in ((6, 8), (1, 1, 6, 8), (1, 1, 1, 1, 1, 1, 1, 6, 8)):
            cut = kind(torch.ones(shape, dtype=dtype))
            cut.untyped_storage().resize_(0 if i == 0 else cut.untyped_storage().nbytes() - 1)
            calls: list[Callable[[], Any]] = [
                lambda cut=cut: ops.linear(cut, matrix),
                lambda cut=cut: ops.layer_norm(cut, row, backend="torch"),
                lambda cut=cut: ops.gelu(cut, backend="torch"),
            ]
            if cut.dim() == 2:
                calls += [
                    lambda cut=cut: ops.linear(matrix, cut),
                    lambda cut=cut: ops.linear_cross_entropy(cut, matrix, targets, backend="torch"),
                ]
            if cut.dim() == 4:
                calls.append(lambda cut=cut: ops.attention(cut, cut, cut, backend="torch"))
            for run in calls:
                with pytest.raises(ValueError, match=r"ends at byte \d+ of its storage, which has \d+|without storage"):
                    run()
    for whole in (row.to("meta"), row.to_sparse(), row[:0], torch.empty(0, 8), [row], None, 3):
        _C.check_storage([whole])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_for_kernels_never_read_beyond_a_storage(dtype: torch.dtype) -> None:
    """Kernels get dense tensors, and some in float32: PyTorch makes them."""
    row, matrix, blocks = torch.ones(64, dtype=dtype), torch.ones(9, 64, dtype=dtype), torch.zeros(9, 68).byte()
    across, vector, rows = (
        torch.ones(64, 6, dtype=dtype).t(),
        torch.ones(128, dtype=dtype)[::2],
        torch.zeros(68, 9).byte().t(),
    )
    for cut in (across, vector, rows):
        cut.untyped_storage().resize_(4)
    for run in (
        lambda: ops.gelu(across, backend="cpu"),
        lambda: ops.gelu(matrix, bias=vector, backend="cpu"),
        lambda: ops.layer_norm(across, row, backend="cpu"),
        lambda: ops.layer_norm(matrix, vector, backend="cpu"),
        lambda: ops.linear(across, matrix, backend="cpu"),
        lambda: ops.linear(matrix, across, backend="cpu"),
        lambda: ops.quantized_linear(across, blocks, "q8_0", backend="cpu"),
        lambda: ops.quantized_linear(matrix, rows, "q8_0", backend="cpu"),
    ):
        with pytest.raises(ValueError, match="storage was resized"):
            run()


def test_an_optimizer_never_gets_a_storage_that_was_resized() -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 8))
    parameter.grad = torch.ones(64, 8)
    optimizer = AdamW([parameter], backend="torch")
    parameter.grad.untyped_storage().resize_(0)
    for run in (optimizer.grad_norm, optimizer.step):
        with pytest.raises(ValueError, match="storage was resized"):
            run()
    assert torch.equal(parameter, torch.ones(64, 8))


def test_a_batch_of_empty_rows_takes_no_memory() -> None:
    """A thousand empty documents in each of a million rows: as a list of boundaries, eight gigabytes."""
    rows, cu = 10**6, torch.zeros(1001, dtype=torch.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _C.check_segments(cu, cu, rows, 0, 0)
    _C.check_segments(cu, cu, rows, 0, 5 * 0)
    x = torch.zeros(rows, 1, 0, 8)
    for backend in (None, "torch"):
        assert ops.attention(x, x, x, cu_seqlens=cu, backend=backend).shape == x.shape
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_boundaries_of_one_row_count_for_every_row() -> None:
    one_q, one_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 3, 6])
    all_q, all_k = torch.tensor([0, 2, 2, 5, 7, 7, 10]), torch.tensor([0, 1, 3, 6, 7, 9, 12])
    expected = [(0, 0, 2, 0, 1), (0, 2, 3, 3, 3), (1, 0, 2, 0, 1), (1, 2, 3, 3, 3)]
    for q in (one_q, all_q):
        for k in (one_k, all_k):
            assert _C.segments(q, k, 2, 5, 6) == expected
