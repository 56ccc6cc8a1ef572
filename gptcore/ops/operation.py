"""The specification of an operation, which the registry, the first-use check, tests and benchmarks iterate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an operation: the shapes of the tensors that it differentiates, and its other arguments."""

    name: str
    call: Callable[..., Any]  # a public function, which takes `backend`
    shapes: Mapping[str, tuple[int, ...]]  # by argument
    settings: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> list[Tensor]:
        """Return normally distributed tensors, the same for every dtype and device up to their rounding."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
            for shape in self.shapes.values()
        ]

    def run(self, tensors: Sequence[Tensor], **settings: Any) -> tuple[Tensor, ...]:
        """Call the operation, with settings on the device of the tensors, and return its outputs."""
        device = tensors[0].device
        arguments = {name: _moved(setting, device) for name, setting in {**self.settings, **settings}.items()}
        out = self.call(**dict(zip(self.shapes, tensors, strict=True)), **arguments)
        return out if isinstance(out, tuple) else (out,)


def _moved(setting: Any, device: torch.device) -> Any:
    """Return a setting with its tensors on a device."""
    if isinstance(setting, tuple):
        return tuple(_moved(part, device) for part in setting)
    return setting.to(device) if isinstance(setting, Tensor) else setting


@dataclass(frozen=True)
class Operation:
    """An operation: its name, its implementations by backend, and sample calls."""

    name: str
    implementations: Mapping[str, Callable[..., Any]]  # "torch" is the formula in plain PyTorch
    samples: Sequence[Sample]  # small; the first sets every optional tensor and setting
    # The call that checks a kernel on its first use on a GPU, given head_dim if it depends on it. None: not checked.
    first_use: Callable[[int], Sample] | None = None
    # PyTorch's own function for the tensors of the sample "plain", against which a call is timed. None: not timed.
    counterpart: Callable[..., Tensor] | None = None
    per_head_dim: bool = False  # each head_dim, the last dimension, has its own kernel
