"""Which calls of ops.linear run our kernel, in training and without gradients; torch.compile and models on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import BF16, DTYPES, F32, leaves, randn
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from gptcore import _C, ops
from gptcore.model import GPT, GPTConfig, Linear
from gptcore.ops.linear import TRAINED


def calls_of_the_kernel(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []
    forward = _C.linear_forward
    with monkeypatch.context() as patch:
        patch.setattr(_C, "linear_forward", lambda *a: (calls.append(1), forward(*a)))
        run()
    return len(calls)


class Special(Tensor):
    """Of a kind that the kernel does not know."""


@pytest.fixture
def fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the kernel is faster in bfloat16."""
    monkeypatch.setitem(TRAINED, _C.cpu_isa(), (BF16,))


def test_the_kernel_is_taken_where_it_is_faster(fast_in_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(300, 8, dtype=BF16).requires_grad_(), randn(9, 8, dtype=BF16)

    def calls(*args: Tensor, **settings: Any) -> int:
        return calls_of_the_kernel(lambda: ops.linear(*args, **settings), monkeypatch)

    assert calls(x, weight) == 1
    assert calls(x.view(10, 30, 8), weight) == 1
    assert calls(x.float(), weight.float()) == 0
    assert calls(x.half(), weight.half()) == 0
    with torch.autocast("cpu", BF16):
        assert calls(x.float(), weight.float()) == 1
    assert calls(x, weight, backend="torch") == 0
    assert calls(x.float(), weight.float(), backend="cpu") == 1
    with ops.use("torch"):
        assert calls(x, weight) == 0
    with ops.use("cpu"):
        assert calls(x, weight) == 1
        assert calls(x.float(), weight.float()) == 0
    assert calls(x.detach().to_sparse(), weight) == 0
    assert calls(x.view(-1, *[1] * 7, 8), weight) == 0
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        assert calls(x, weight) == 0
    assert counter.get_total_flops() == 2 * 300 * 8 * 9
    x = x.detach()
    traced = torch.jit.trace(ops.linear, (x, weight), check_trace=False)
    assert torch.equal(traced(2 * x, weight), F.linear(2 * x, weight))
    torch.testing.assert_close(
        torch.func.vmap(ops.linear, (0, None))(x.view(1, 300, 8), weight)[0], F.linear(x, weight)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(ops.linear(dual, weight)).tangent
    torch.testing.assert_close(tangent, F.linear(x, weight))
    assert calls(x, weight.as_subclass(Special)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_taken_where_nothing_is_differentiated(
    fast_in_bfloat16: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = leaves(randn(3, 8, dtype=dtype), randn(9, 8, dtype=dtype))

    def calls(x: Tensor) -> int:
        return calls_of_the_kernel(lambda: ops.linear(x, weight), monkeypatch)

    assert calls(x) == (dtype is BF16)
    with torch.no_grad():
        assert calls(x) == 1
        assert calls(x[:1]) == 1
    weight.requires_grad_(False)
    assert calls(x.detach()) == 1


def test_a_model_in_bfloat16_runs_on_the_kernel(fast_in_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    ids = torch.randint(50, (4, 64))
    assert calls_of_the_kernel(lambda: model(ids), monkeypatch) == 0
    with torch.autocast("cpu", BF16):
        assert calls_of_the_kernel(lambda: model(ids), monkeypatch) == 9
    assert calls_of_the_kernel(lambda: model.bfloat16()(ids), monkeypatch) == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_logits_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval().to(dtype)
    ids = torch.randint(50, (7, 20))
    with torch.no_grad():
        together = model(ids).logits
        for rows in (1, 2, 3, 5):
            assert torch.equal(model(ids[:rows]).logits, together[:rows])


def test_the_module_is_torchs_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours = Linear(5, 7)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(5, 7)
    x = randn(3, 5)
    assert isinstance(ours, torch.nn.Linear)
    assert torch.equal(ours(x), theirs(input=x))
    monkeypatch.setattr(ops, "linear", lambda *args: args)
    assert ours(input=x) == (x, ours.weight, ours.bias)


def test_a_model_in_bfloat16_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model = GPT(GPTConfig(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    ids, names = torch.randint(50, (4, 64)), set()

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=2e-2, atol=1e-2)
    assert "aten.addmm.default" in names
    assert "gptcore.linear_forward.default" not in names


def test_the_operators_are_registered_as_pytorch_wants_them() -> None:
    x, weight, bias = randn(2, 5, 8), randn(9, 8), randn(9)
    for maybe in (bias, None):
        torch.library.opcheck(torch.ops.gptcore.linear_forward.default, (x, weight, maybe, BF16, "cpu"))
        for needs in itertools.product([True, False], repeat=3):
            if maybe is None and needs[2]:
                continue
            tensors = randn(2, 5, 9), x if needs[1] else None, weight if needs[0] else None
            arguments = (*tensors, 8, F32, F32, F32, list(needs), "cpu")
            torch.library.opcheck(torch.ops.gptcore.linear_backward.default, arguments)
