"""ops.linear_cross_entropy against its formula in float64, by the rule of grid.py; chunks, memory and refusals."""

from __future__ import annotations

import itertools
import math
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import BACKENDS, BF16, DTYPES, F16, F32, F64, check, leaves, randn, running
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import _C, ops
from gptcore.config import GPTConfig
from gptcore.model import GPT

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def targets_for(shape: tuple[int, ...], vocab: int, ignored: float = 0.3, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def loss_and_gradients(function: Any, x: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    x, weight = leaves(x, weight)
    loss = function(x, weight, targets)
    (loss * scale).backward()
    return [loss.detach(), x.grad, weight.grad]


def formula(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With PyTorch's operations in the dtype of x, as in training: float64 is the oracle."""
    logits = F.linear(x, weight).flatten(0, -2)
    wide = logits.to(torch.promote_types(x.dtype, F32))
    count = max(1, int((targets != -100).sum()))
    return F.cross_entropy(wide, targets.flatten(), reduction="sum") / count


def compare(argument: str, x: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> None:
    got = loss_and_gradients(lambda *a: ops.linear_cross_entropy(*a, backend=argument), x, weight, targets, scale)
    ref = loss_and_gradients(formula, x.double(), weight.double(), targets, scale)
    theirs = loss_and_gradients(formula, x, weight, targets, scale)
    assert [t.dtype for t in got] == [F32, x.dtype, weight.dtype]
    for name, *values in zip(("loss", "grad_x", "grad_weight"), got, ref, theirs, strict=True):
        check(name, *values)


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 65, 4097, 50257])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (0,)])
def test_it_equals_the_formula(backend: str, shape: tuple[int, ...], vocab: int, dtype: torch.dtype) -> None:
    x, weight = randn(*shape, 24, dtype=dtype, seed=1), randn(vocab, 24, dtype=dtype, seed=2, scale=0.5)
    compare(backend, x, weight, targets_for(shape, vocab), scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_edges(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row, of several with a smaller last one, and blocks of the vocabulary that do not fit."""
    module = sys.modules["gptcore.ops.linear_cross_entropy"]  # the name in the package is the function
    x, weight, targets = randn(13, 8, dtype=dtype), randn(65, 8, dtype=dtype, seed=1), targets_for((13,), 65)
    monkeypatch.setattr(module, "VOCAB_BLOCK", 20)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 65 * dtype.itemsize)
    for rows in (1, 4, 5, 13):
        monkeypatch.setattr(module, "CHUNK", rows)
        compare(backend, x, weight, targets)


def logits_case(logits: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight whose product is these logits, exactly."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("vocab", [3, 40, 300])
def test_logits_that_are_equal_or_huge(backend: str, vocab: int, dtype: torch.dtype) -> None:
    for logits in (
        torch.full((4, vocab), 3.5, dtype=dtype),
        randn(4, vocab, scale=1e4, dtype=dtype),
        randn(4, vocab, shift=-1e4, dtype=dtype),
        randn(4, vocab, dtype=dtype).masked_fill(torch.eye(4, vocab, dtype=torch.bool), 1e4),
    ):
        compare(backend, *logits_case(logits), targets_for((4,), vocab, ignored=0.0))


@pytest.mark.parametrize("position", [0, 5, 4095, 4096, 8999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_logits_do_as_in_pytorch(kernel: None, dtype: torch.dtype, position: int) -> None:
    """Straight into the kernel: a matmul would make NaN of 0 x infinity. The places are in and beyond one stretch."""
    logits = randn(6, 9000, dtype=dtype)
    logits[0, position] = -math.inf
    logits[1, position] = math.inf
    logits[2, position] = math.nan
    logits[3] = -math.inf
    logits[4] = -math.inf
    logits[4, position] = 2.0
    logits[5, : min(position, 4096)] = -math.inf  # a first stretch without one possible token
    targets = torch.full((6,), position)
    targets[5] = 8998
    for row in range(6):
        ours, theirs = logits[row : row + 1].clone(), logits[row : row + 1].float().requires_grad_()
        expected = F.cross_entropy(theirs, targets[row : row + 1], reduction="sum")
        expected.backward()
        loss = _C.cross_entropy(ours, targets[row : row + 1], True, 1)
        assert loss == pytest.approx(expected.item(), rel=1e-6, abs=1e-6, nan_ok=True), row
        torch.testing.assert_close(ours.float(), theirs.grad, rtol=1e-2, atol=1e-6, equal_nan=True)


def test_rows_may_lie_apart(kernel: None) -> None:
    logits, targets = randn(5, 65), torch.tensor([1, 2, 3, 0, 64])
    room = torch.full((5, 80), math.nan)
    apart = room[:, :65].copy_(logits)
    assert _C.cross_entropy(apart, targets, True, 1) == _C.cross_entropy(logits, targets, True, 1)
    assert torch.equal(apart, logits)
    assert room[:, 65:].isnan().all()
    with pytest.raises(ValueError, match="shares memory with itself"):
        _C.cross_entropy(logits[:1].expand(5, 65), targets, True, 1)


def test_without_a_gradient_the_logits_stay(kernel: None) -> None:
    logits = randn(3, 65)
    before = logits.clone()
    total = _C.cross_entropy(logits, torch.tensor([1, 2, 3]), False, 1)
    assert torch.equal(logits, before)
    assert total == _C.cross_entropy(logits, torch.tensor([1, 2, 3]), True, 1)


# ---- what does not count ---------------------------------------------------------------------------------------------


def test_nothing_counts(backend: str) -> None:
    x, weight, targets = randn(5, 8), randn(9, 8), torch.full((5,), -100)
    loss, *gradients = loss_and_gradients(lambda *a: ops.linear_cross_entropy(*a, backend=backend), x, weight, targets)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)


def test_another_ignore_index(backend: str) -> None:
    x, weight, targets = randn(5, 8), randn(9, 8), torch.tensor([0, 3, 0, 8, 2])
    loss = ops.linear_cross_entropy(x, weight, targets, ignore_index=0, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), targets, ignore_index=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [33, 64, 65])
def test_whatever_new_memory_holds(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's matmul in AMX's tiles reads a column beyond an odd number of them, and 0 x NaN is NaN."""
    x, weight, targets = randn(40, 16, dtype=dtype), randn(vocab, 16, seed=1, dtype=dtype), targets_for((40,), vocab)
    expected = loss_and_gradients(ops.linear_cross_entropy, x, weight, targets)
    given = []

    def full_of_nan(purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        given.append(torch.full(shape, math.nan, dtype=dtype))
        return given[-1]

    monkeypatch.setattr(sys.modules["gptcore.ops.linear_cross_entropy"], "_kept", full_of_nan)
    for got, before in zip(loss_and_gradients(ops.linear_cross_entropy, x, weight, targets), expected, strict=True):
        assert torch.equal(got, before)
    assert not any(memory.isnan().any() for memory in given)


def test_a_token_that_does_not_count_may_hold_anything() -> None:
    x, weight, targets = randn(3, 8), randn(9, 8), torch.tensor([1, -100, 4])
    plain = loss_and_gradients(ops.linear_cross_entropy, x, weight, targets)
    x[1] = math.nan
    for ours, expected in zip(loss_and_gradients(ops.linear_cross_entropy, x, weight, targets), plain, strict=True):
        assert torch.equal(ours, expected)


# ---- autograd, autocast, layouts, threads ----------------------------------------------------------------------------


@pytest.mark.parametrize(("train_x", "train_weight"), [(True, False), (False, True), (False, False)])
def test_only_what_needs_a_gradient_gets_one(backend: str, train_x: bool, train_weight: bool) -> None:
    x, weight, targets = randn(5, 8), randn(9, 8), targets_for((5,), 9)
    expected = loss_and_gradients(formula, x, weight, targets)
    x.requires_grad_(train_x)
    weight.requires_grad_(train_weight)
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    torch.testing.assert_close(loss.detach(), expected[0])
    assert loss.requires_grad == (train_x or train_weight)
    if loss.requires_grad:
        loss.backward()
    for tensor, gradient, needed in ((x, expected[1], train_x), (weight, expected[2], train_weight)):
        if needed:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_two_backward_passes_add_up(backend: str) -> None:
    x, weight = leaves(randn(5, 8), randn(9, 8))
    loss = ops.linear_cross_entropy(x, weight, targets_for((5,), 9), backend=backend)
    loss.backward(retain_graph=True)
    once = [x.grad.clone(), weight.grad.clone()]
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_autocast(backend: str) -> None:
    """bfloat16 logits like F.linear's, a float32 loss, and gradients in the dtype of the weights."""
    x, weight, targets = randn(40, 24), randn(65, 24, seed=1), targets_for((40,), 65)

    def run(function: Any) -> list[Tensor]:
        a, b = leaves(x, weight)
        with torch.autocast("cpu", BF16):
            loss = function(a, b, targets)
        loss.backward()
        return [loss.detach(), a.grad, b.grad]

    ref = loss_and_gradients(formula, x.double(), weight.double(), targets)
    theirs = run(lambda a, b, t: F.cross_entropy(F.linear(a, b).float(), t))
    ours = run(lambda *a: ops.linear_cross_entropy(*a, backend=backend))
    assert [t.dtype for t in ours] == [F32] * 3
    for name, *values in zip(("loss", "grad_x", "grad_weight"), ours, ref, theirs, strict=True):
        assert values[0].dtype == F32
        check(name, *values)
    assert float((ours[1] - ref[1]).norm() / ref[1].norm()) > 1e-4, "this was not computed in bfloat16"


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    x, weight = randn(2, 4, 20, dtype=dtype)[..., ::2], randn(10, 33, dtype=dtype, seed=1).t()
    targets = targets_for((4, 2), 33, ignored=0.0).t()
    dense = loss_and_gradients(ops.linear_cross_entropy, x.contiguous(), weight.contiguous(), targets.contiguous())
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    loss.backward()
    for ours, expected in zip((loss.detach(), x.grad, weight.grad), dense, strict=True):
        check("strided", ours, expected.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_matter(kernel: None, dtype: torch.dtype) -> None:
    """To the kernel: to PyTorch's float32 matmul it does."""
    logits, targets = randn(9, 5001, dtype=dtype), targets_for((9,), 5001, ignored=0.0)
    results = []
    for count in (1, 2, 3):
        copy = logits.clone()
        results.append((_C.cross_entropy(copy, targets, True, count), copy))
    assert all(loss == results[0][0] and torch.equal(copy, results[0][1]) for loss, copy in results)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("argument", ["cpu", "torch"])
def test_it_compiles_into_one_graph(argument: str, needs: tuple[bool, bool]) -> None:
    torch._dynamo.reset()
    x, weight, targets = randn(3, 5, 8), randn(9, 8, seed=1), targets_for((3, 5), 9)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return ops.linear_cross_entropy(a * 2, b, targets, backend=argument) * 3

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        a, b = x.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        loss = function(a, b)
        if any(needs):
            loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    torch.testing.assert_close(*results)


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    x, weight = randn(5, 8), randn(9, 8)
    for needs in itertools.product([True, False], repeat=2):
        arguments = (x, weight, targets_for((5,), 9), F32, -100, *needs, "cpu")
        torch.library.opcheck(torch.ops.gptcore.linear_cross_entropy.default, arguments)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_logits_of_all_tokens_never_exist(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, vocab, chunk = 400, 4, 2000, 48
    module = sys.modules["gptcore.ops.linear_cross_entropy"]
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3)
    x, weight = leaves(randn(rows, width, dtype=dtype), randn(vocab, width, dtype=dtype))
    largest = {}
    for argument in ("cpu", "torch"):
        with Largest() as seen:
            ops.linear_cross_entropy(x, weight, targets_for((rows,), vocab), backend=argument).backward()
        largest[argument] = seen.elements
    assert largest["torch"] == rows * vocab, "this counts as it should"
    assert largest["cpu"] <= chunk * vocab, "larger than a chunk"


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_memory_is_taken_again_when_nothing_lives_in_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["gptcore.ops.linear_cross_entropy"], "LARGE", 0)

    def gradient(seed: int, rows: int = 5) -> Tensor:
        x, weight = randn(rows, 8, dtype=dtype, seed=seed), randn(65, 8, dtype=F32).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is BF16):
            ops.linear_cross_entropy(x, weight, targets_for((rows,), 65, ignored=0.0), backend="cpu").backward()
        assert weight.grad is not None
        return weight.grad

    first = gradient(1)
    before, address = first.clone(), first.data_ptr()
    second = gradient(2)
    assert second.data_ptr() != address
    assert torch.equal(first, before), "overwritten while it is in use"
    assert torch.equal(gradient(1), before), "the same bits in used memory"
    address = gradient(3).data_ptr()
    assert gradient(4).data_ptr() == address
    view = gradient(3, rows=4)[:9]  # a part of a tensor keeps its memory as well
    before = view.clone()
    assert gradient(4).data_ptr() != view.data_ptr()
    assert torch.equal(view, before)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(5, 7)}, ValueError, r"weight has shape (9, 8), expected (vocabulary, 7)"),
        ({"x": torch.ones(5, 8).long()}, ValueError, "x is torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "expected a floating-point dtype and (..., width)"),
        ({"x": [1.0]}, TypeError, "x is a list, expected a torch.Tensor"),
        ({"weight": torch.ones(0, 8)}, ValueError, "weight has shape (0, 8)"),
        ({"weight": torch.ones(9, 8, dtype=F16)}, ValueError, "weight is torch.float16, expected torch.float32 like x"),
        ({"weight": torch.ones(9, 8, device="meta")}, ValueError, "weight on meta"),
        ({"targets": torch.ones(5)}, ValueError, "targets is torch.float32 of shape (5,), expected int64 of (5,)"),
        ({"targets": torch.ones(5, dtype=torch.int32)}, ValueError, "targets is torch.int32"),
        ({"targets": torch.ones(5, 1).long()}, ValueError, "targets is torch.int64 of shape (5, 1)"),
        (
            {"targets": torch.tensor([0, 8, -100, 9, 1])},
            ValueError,
            "target 9 at index 3 is outside of the vocabulary of 9",
        ),
        ({"targets": torch.tensor([0, -1, 2, 3, 4])}, ValueError, "target -1 at index 1"),
        ({"targets": torch.tensor([0, 1, 2, 3, 2**62])}, ValueError, f"target {2**62} at index 4"),
    ],
)
@pytest.mark.parametrize("argument", ["cpu", "torch"])
def test_bad_arguments_are_refused(argument: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(5, 8), "weight": torch.ones(9, 8), "targets": torch.zeros(5).long()} | change
    with pytest.raises(error, match=re.escape(message)):
        ops.linear_cross_entropy(**arguments, backend=argument)


def test_float64_is_for_the_torch_backend() -> None:
    arguments = (torch.ones(5, 8, dtype=F64), torch.ones(9, 8, dtype=F64), torch.zeros(5).long())
    assert ops.linear_cross_entropy(*arguments).dtype == F64
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        ops.linear_cross_entropy(*arguments, backend="cpu")


@QUICK
@given(
    st.sampled_from([F32, BF16, F16, F64, torch.int64]),
    st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.integers(-1, 3),
)
def test_the_native_function_refuses_what_does_not_fit(
    dtype: torch.dtype, shape: list[int], target_shape: list[int], target: int, dense: bool, num_threads: int
) -> None:
    logits, targets = torch.zeros(shape, dtype=dtype), torch.full(target_shape, target)
    logits = logits if dense else logits.transpose(0, -1) if shape else logits
    dense_rows = logits.dim() == 2 and (logits.shape[1] < 2 or logits.stride(1) == 1)
    fits = (
        dtype.is_floating_point and dtype != F64 and dense_rows and target_shape == [logits.shape[0]]
        and (0 <= target < logits.shape[1] or logits.shape[0] == 0) and num_threads > 0
    )  # fmt: skip
    if fits:
        loss = _C.cross_entropy(logits, targets, True, num_threads)
        assert loss == pytest.approx(len(logits) * math.log(max(1, logits.shape[1])), abs=1e-5)
    else:
        with pytest.raises(ValueError, match=r"expected|dense|outside"):
            _C.cross_entropy(logits, targets, True, num_threads)


# ---- in the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_model_computes_the_same_loss_without_logits(name: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=33, tie_word_embeddings=tied)
    ).eval()
    ids = torch.randint(33, (2, 9))
    mask = torch.ones(2, 9).bool()
    mask[1, 6:] = False
    results = []
    with running(name), ops.use(BACKENDS[name][0]):
        for return_logits in (True, False):
            model.zero_grad()
            out = model(ids, mask, labels=ids, return_logits=return_logits)
            out.loss.backward()
            results.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert out.logits.shape == (2, 0, 33)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="return_logits=False returns the loss alone, which needs labels"):
        model(ids, return_logits=False)


@pytest.mark.parametrize("large", [0, 1 << 20])
def test_the_gradient_of_a_tied_weight_is_never_copied(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the lookup is added to the projection's in place: in GPT-2 a copy would take 154 MB."""
    monkeypatch.setattr(sys.modules["gptcore.ops.linear_cross_entropy"], "LARGE", large)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=33)).eval()
    ids = torch.randint(33, (2, 9))

    def copies(retain_graph: bool) -> int:
        loss = model(ids, labels=ids, return_logits=False).loss
        with torch.profiler.profile(record_shapes=True) as profile:
            loss.backward(retain_graph=retain_graph)
        if retain_graph:
            loss.backward()
        return sum(event.name == "aten::copy_" and event.input_shapes[0] == [33, 16] for event in profile.events())

    assert copies(retain_graph=False) == 0
    once = model.wte.weight.grad.clone()
    model.zero_grad()
    assert copies(retain_graph=True) == 0
    torch.testing.assert_close(model.wte.weight.grad, 2 * once)
    model.wte.weight.register_hook(torch.clone)
    model.zero_grad()
    assert copies(retain_graph=False) == 1, "this counts as it should"
