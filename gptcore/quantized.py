"""Layers whose weights are in blocks of 8 or 4 bits, as `GPT.from_pretrained("model.gguf")` makes them.

The weights are buffers and get no gradient; inputs do. The other parameters of the model are frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptcore import ops
from gptcore.config import IGNORED
from gptcore.ops.quantized_linear import BLOCK, BYTES, dequantize

CHUNK = 512  # rows whose logits are in memory at once


class QuantizedWeight(nn.Module):
    """A matrix (out_features, in_features) in blocks: `weight`, uint8 (out_features, bytes of a row), and `kind`."""

    weight: Tensor

    def __init__(self, out_features: int, in_features: int, kind: str) -> None:
        super().__init__()
        self.out_features, self.in_features, self.kind = out_features, in_features, kind
        shape = out_features, in_features // BLOCK * BYTES[kind]
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device="meta"))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"

    def numel(self) -> int:
        """Return the number of weights."""
        return self.out_features * self.in_features

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ matrix.T + bias."""
        return ops.quantized_linear(x, self.weight, self.kind, bias)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of `project(hidden)`, in float32, over the targets that are not IGNORED.

        Logits are computed in chunks, and again in the backward pass, so they are never all in memory.
        """
        run: Callable[[Tensor, Tensor], Tensor] = self._sum
        if torch.is_grad_enabled():  # else this would only import torch._dynamo, which takes seconds
            run = functools.partial(checkpoint, self._sum, use_reentrant=False, preserve_rng_state=False)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows, labels in zip(hidden.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True):
            total = total + run(rows, labels)
        return total / (targets != IGNORED).sum().clamp(min=1)

    def _sum(self, rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.project(rows).float(), labels, ignore_index=IGNORED, reduction="sum")


class QuantizedLinear(QuantizedWeight):
    """A linear layer."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.out_features, linear.in_features, kind)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.project(input, self.bias)


class QuantizedEmbedding(QuantizedWeight):
    """An embedding, and with `project` the output projection that is tied to it."""

    def __init__(self, embedding: nn.Embedding, kind: str) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, kind)

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantize(self.weight[input_ids], self.kind, dtype)


def quantize_modules(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Replace modules by quantized ones without values, given the kinds of their weights by name; freeze the others."""
    for name, kind in kinds.items():
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        owner = model.get_submodule(parent)
        module = getattr(owner, last)
        made = QuantizedLinear(module, kind) if isinstance(module, nn.Linear) else QuantizedEmbedding(module, kind)
        setattr(owner, last, made)
    if kinds:
        model.requires_grad_(False)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Return the kinds of the quantized weights by name; empty for a model without any."""
    return {
        f"{name}.weight": module.kind for name, module in model.named_modules() if isinstance(module, QuantizedWeight)
    }
