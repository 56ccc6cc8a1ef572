"""cu_seqlens: boundaries that hold for every row, that are refused, and how often they are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid import DTYPES, SLOW, randn, running

from gptcore import _C, GPT, GPTConfig, ops
from gptcore.generation import Batch, Settings

T4 = torch.zeros(2, 4, 6, 8)


def test_boundaries_of_one_row_hold_for_every_row(backend: str) -> None:
    q, k, v = (randn(3, 2, 20, 8, seed=s) for s in range(3))
    one = torch.tensor([0, 7, 7, 20])
    every = torch.tensor([0, 7, 7, 20, 27, 27, 40, 47, 47, 60])
    out = ops.attention(q, k, v, cu_seqlens=one, backend=backend)
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=every.int(), backend=backend))
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=(one.int(), every[:4]), backend=backend))
    strided = torch.stack((every, -every), dim=1)[:, 0]
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=strided, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", _C.supported_isas())
def test_a_document_has_the_bits_that_it_has_alone(isa: str, dtype: torch.dtype) -> None:
    """Short documents take the decoding kernel, others that of many queries, whatever is beside them."""
    q, k, v, grad = (4 * randn(2, 128, 16, seed=s).to(dtype) for s in range(4))
    lengths = [1, 90, 8, 9, 20]

    def run(*tensors: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        inputs = [tensor[None].requires_grad_() for tensor in tensors[:3]]
        out = ops.attention(*inputs, cu_seqlens=cu_seqlens, backend="cpu")
        return (out.detach(), *torch.autograd.grad(out, inputs, tensors[3][None]))

    with running(f"cpu-{isa}"):
        packed = run(q, k, v, grad, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
        alone = [run(*parts) for parts in zip(*(t.split(lengths, dim=1) for t in (q, k, v, grad)), strict=True)]
    for ours, others in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(others, dim=2))


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([], "expected"),
        ([0], "ends at 0, expected length = 6 or batch x length = 2 x 6 = 12"),
        ([1, 6], "begins with 1, expected 0"),
        ([0, 4, 3, 12], "decreases from 4 to 3 at index 2"),
        ([0, 7], "ends at 7"),
        ([0, 5, 12], "crosses the end of batch row 0 at 6"),
        ([0, 6, 13], "ends at 13"),
        ([0, 2**62, 12], "decreases"),
        ([0.0, 12.0], "int32 or int64"),
        ([[0, 12]], "1-D"),
        (([0, 6, 12], [0, 12]), "has 3 boundaries and cu_seqlens_k has 2"),
        (([0, 6, 12], [0, 7, 12]), "is not inside batch row 0"),
        (([0, 6, 12],), "pair"),
    ],
    ids=str,
)
def test_boundaries_that_are_none(backend: str, boundaries: Any, message: str) -> None:
    cu = (
        tuple(torch.tensor(cu) for cu in boundaries)
        if isinstance(boundaries, tuple)
        else torch.tensor(boundaries, dtype=None if boundaries else torch.int64)
    )
    with pytest.raises(ValueError, match=message):
        ops.attention(T4, T4, T4, cu_seqlens=cu, backend=backend)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The lengths of each check of boundaries, which would wait for a GPU."""
    lengths, check = [], _C.check_segments

    def counted(*args: Any) -> None:
        lengths.append(args[2:])
        check(*args)

    monkeypatch.setattr(_C, "check_segments", counted)
    return lengths


@pytest.mark.parametrize("backend", ["torch", *SLOW])  # the CPU's kernels read the boundaries themselves
def test_boundaries_are_checked_once_until_they_change(backend: str, checks: list[tuple[Any, ...]]) -> None:
    cu, q = torch.tensor([0, 4, 10]), randn(2, 1, 5, 8)

    def attend(cu: Any, q: torch.Tensor = q) -> None:
        ops.attention(q, q, q, cu_seqlens=cu, backend=backend)

    with pytest.raises(ValueError, match="crosses the end of batch row 0"):
        attend(cu)
    cu[1] = 5
    for _ in range(3):
        attend(cu)
    assert len(checks) == 2
    attend((cu, cu.clone()))  # another tensor
    attend(torch.tensor([0, 5]))
    attend(torch.tensor([0, 5]), q[:1])
    assert checks[2:] == [(2, 5, 5)] * 2 + [(1, 5, 5)]
    cu[1] = 6
    for _ in range(2):
        with pytest.raises(ValueError, match="crosses the end"):
            attend(cu)
    with torch.inference_mode():  # whose tensors do not count changes
        cu = torch.tensor([0, 5, 10])
        attend(cu)
        cu[1] = 4
        with pytest.raises(ValueError, match="crosses the end"):
            attend(cu)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("backend", ["torch", *SLOW])
def test_the_layers_of_a_model_share_one_check_and_generation_needs_none(
    backend: str, inference: bool, checks: list[tuple[Any, ...]]
) -> None:
    config = GPTConfig(vocab_size=17, n_positions=16, n_layer=3, n_head=1, n_embd=8, eos_token_id=None)
    torch.manual_seed(0)
    model = GPT(config).eval()
    batch = Batch(model)
    with ops.use(backend), torch.inference_mode(inference):
        model(torch.tensor([[1, 2, 3, 4, 5, 6]]), cu_seqlens=torch.tensor([0, 1, 4, 6]))
        assert len(checks) == (3 if inference else 1)
        checks.clear()
        for prompt in ([1], [2, 3, 4], [5, 6]):
            batch.add(prompt, Settings(5))
        tokens = [batch.step() for _ in range(3)]
    assert not checks
    assert [len(step) for step in tokens] == [3, 3, 3]
