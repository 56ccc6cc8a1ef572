"""Checks and casts that the arguments of several operations go through."""

from __future__ import annotations

import numpy as np
import torch


def check_tensors(*, optional: bool = False, **tensors: object) -> None:
    """Raise TypeError for the first argument that is not a tensor (nor None, if optional)."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) and not (optional and tensor is None):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")


_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def check_numbers(**numbers: object) -> None:
    """Raise TypeError for the first argument that is not a number, such as a tensor, whose gradient would be lost."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, _NUMBERS):
            raise TypeError(f"{name} is {number!r}, expected a number")


def check_flags(**flags: object) -> None:
    """Raise TypeError for the first argument that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}, expected True or False")


def check_like(x: torch.Tensor, shape: torch.Size, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError for the first without this shape, x's device, and x's dtype or float32."""
    dtype, device = x.dtype, x.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for x of {tuple(x.shape)}"
            )
        if tensor.dtype not in (dtype, torch.float32) or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} or torch.float32 on {device}"
            )


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return float32 tensors in the dtype of torch.autocast, as for PyTorch's own attention, and others unchanged."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """Return the dtype of torch.autocast on the device of a tensor, or None where it is off."""
    device = "cpu" if tensor.is_cpu else tensor.device.type  # asking for the type takes longer
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
