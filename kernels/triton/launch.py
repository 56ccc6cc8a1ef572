"""Launches of the kernels: tiles and devices.

Tiles come from tables: by default nothing is tuned at run time. With GPTCORE_TRITON_AUTOTUNE=1 the first call of each
kernel with a dtype and head_dim, with or without documents and dropout, times every tile of its table, which takes
seconds, and stores the best in a file that later processes read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
OPTIONS = {"enable_fp_fusion": True}  # the default differs between versions of Triton


class Tile(NamedTuple):
    """The two sizes of a tile, named by the kernel, and the compiler's number of warps and stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """Return the row of the tables for a device: an architecture whose instructions and shared memory it has."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache; small in the interpreter, so that small tensors fill it."""
    return 1 << 16 if INTERPRETED else torch.cuda.get_device_properties(device).L2_cache_size


def view(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor with its strides, except the last, which is 1: the argument that kernels expect."""
    return (tensor, *tensor.stride()[:-1])


def launch(
    kernel: Any,
    tiles: Sequence[Tile],
    names: tuple[str, ...],
    programs: Callable[[Tile], int],
    *arguments: Any,
    like: Tensor,
    **constants: Any,
) -> None:
    """Launch a kernel with the first of these tiles or, with autotuning, with the fastest.

    Args:
        names: the kernel's names of the two sizes of a tile.
        programs: the number of programs for a tile; with 0 nothing is launched.
        like: a tensor with the device and dtype of the call.
        constants: other constants that the kernel is compiled for, and values of OPTIONS.
    """

    def run(tile: Tile) -> None:
        sizes = dict(zip(names, tile, strict=False))
        kernel[(programs(tile),)](
            *arguments, **sizes, num_warps=tile.warps, num_stages=tile.stages, **(OPTIONS | constants)
        )

    if programs(tiles[0]) == 0:
        return
    with torch.cuda.device_of(like):  # Triton launches on the current device
        tile = tiles[0]
        if len(tiles) > 1 and os.environ.get("GPTCORE_TRITON_AUTOTUNE") == "1":
            versions = f"triton {triton.__version__}", torch.cuda.get_device_name(like.device)
            # A kernel without documents or dropout needs fewer registers.
            without = [name for name, value in zip(kernel.arg_names, arguments, strict=False) if value is None]
            key = kernel.__name__, *versions, like.dtype, constants, f"without {without}"
            tile = tuned(", ".join(map(str, key)), tiles, run)
        run(tile)


# ---- tuning ----------------------------------------------------------------------------------------------------------


def read_tiles() -> dict[str, Any]:
    """Return the tiles that earlier processes found, by kernel. gptcore.ops.native replaces this and write_tiles."""
    return {}


def write_tiles(tiles: dict[str, Any]) -> None:
    """Keep tiles for later processes."""


def milliseconds(run: Callable[[], None]) -> float:
    """Return the time of a kernel; infinity if the device lacks registers or shared memory for it."""
    try:
        return float(triton.testing.do_bench(run))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


_chosen: dict[str, Tile] = {}


def tuned(key: str, tiles: Sequence[Tile], run: Callable[[Tile], None]) -> Tile:
    """Return the fastest of these tiles: the one found earlier, or else measured now and kept."""
    if key not in _chosen:
        known = read_tiles()
        if known.get(key) not in map(list, tiles):
            known[key] = list(min(dict.fromkeys(tiles), key=lambda tile: milliseconds(lambda: run(tile))))
            write_tiles(known)
        _chosen[key] = Tile(*known[key])
    return _chosen[key]
