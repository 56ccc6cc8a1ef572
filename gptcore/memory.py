"""How much memory a device has."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is none


def total_memory(device: torch.device | None = None) -> int:
    """Return the bytes of memory of a GPU; for any other device and for None, of this machine or container."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return total


def check_fits(num_parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, with the numbers, for more parameters than the device has memory. The meta device takes any."""
    if device.type not in ("cpu", "cuda"):
        return
    needed, there = num_parameters * dtype.itemsize, total_memory(device)
    if needed > there:
        raise ValueError(
            f"{num_parameters:,} parameters take {needed / 1e9:,.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"but {device} has {there / 1e9:,.1f} GB; use a smaller model"
        )
