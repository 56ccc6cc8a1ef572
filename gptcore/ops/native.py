"""How native kernels become PyTorch operators that autograd and torch.compile understand.

An operator is a schema, a body that allocates the outputs and calls gptcore._C, and a fake of the body that only
allocates. Bodies see real tensors, so what depends on their values is checked there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("gptcore", "DEF")


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register torch.ops.gptcore.<name> for CPU tensors and return it."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, body, "CPU")
    torch.library.register_fake(f"gptcore::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.gptcore, name).default


def check_tensors(*, optional: bool = False, **tensors: object) -> None:
    """Raises TypeError for the first argument that is no tensor (nor None, if optional)."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) and not (optional and tensor is None):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Inside torch.autocast, float32 tensors in its dtype, as for PyTorch's own attention; else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in tensors)
