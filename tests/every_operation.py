"""Every operation as a function of one tensor, and of all its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore import ops
from gptcore.ops import registry


def as_heads(x: Tensor) -> list[Tensor]:
    """q, k and v (1, 2, 3, 8), made of (6, 8)."""
    return [x.view(1, 2, 3, 8), 0.5 * x.view(1, 2, 3, 8), x.view(1, 2, 3, 8) + 1]


HERE = [name for name, backend in registry.BACKENDS.items() if not backend.problem() and "cuda" not in backend.devices]
TARGETS, CU, ROW, ONES, MATRIX = (
    torch.tensor([1, 2, -100, 0, 3, 4]), torch.tensor([0, 1, 3]), torch.linspace(1, 2, 8), torch.ones(9),
    torch.linspace(-1, 1, 72).view(9, 8),
)  # fmt: skip
# Every operation as a function of one tensor (6, 8)
OF_ONE_TENSOR: dict[str, Callable[..., Any]] = {
    "attention": lambda x, **b: ops.attention(*as_heads(x), **b),
    "documents": lambda x, **b: ops.attention_with_lse(*as_heads(x), cu_seqlens=CU, **b),
    "qkvpacked": lambda x, **b: ops.attention_qkvpacked(x.view(1, 2, 3, 1, 8), window=(1, -1), **b),
    "layer_norm": lambda x, **b: ops.layer_norm(x, ROW, ONES[1:], **b),
    "residual": lambda x, **b: ops.layer_norm(x, ROW, residual=2 * x, **b),
    "gelu": lambda x, **b: ops.gelu(x, bias=ROW, approximate="none", **b),
    "linear": lambda x, **b: ops.linear(x, MATRIX, ONES, **b),
    "linear_cross_entropy": lambda x, **b: ops.linear_cross_entropy(x, MATRIX, TARGETS, **b),
}
# And of all its tensors
HEADS = as_heads(torch.linspace(-2, 2, 48).view(6, 8))
OF_ALL_TENSORS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "attention": (ops.attention, HEADS),
    "qkvpacked": (ops.attention_qkvpacked, [torch.linspace(-2, 2, 96).view(1, 2, 3, 2, 8)]),
    "layer_norm": (
        lambda x, w, c, r, **b: ops.layer_norm(x, w, c, residual=r, **b),
        [MATRIX, ROW, ROW + 1, 3 * MATRIX],
    ),
    "gelu": (lambda x, c, **b: ops.gelu(x, bias=c, **b), [MATRIX, ROW]),
    "linear": (ops.linear, [MATRIX[:5], MATRIX, ONES]),
    "linear_cross_entropy": (lambda x, w, **b: ops.linear_cross_entropy(x, w, TARGETS, **b), [MATRIX[:6], MATRIX]),
}
every_tensor = pytest.mark.parametrize(
    ("name", "argument"), [(name, i) for name, (_, tensors) in OF_ALL_TENSORS.items() for i in range(len(tensors))]
)
every_operation = pytest.mark.parametrize("name", OF_ONE_TENSOR)


def flat(result: Any) -> Tensor:
    """All numbers of a result in one dimension."""
    return torch.cat([t.flatten() for t in (result if isinstance(result, tuple) else (result,))])
