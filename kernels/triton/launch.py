"""How the kernels are started: with which tile, on which device.

Tiles come from tables, so that no call ever waits for a tuner that nobody asked for. GPTCORE_TRITON_AUTOTUNE=1 asks for
one: the first call of each kernel with some dtype and head_dim, with or without documents and dropout, then times every
tile of its table, for some seconds, and keeps the best in a file, from which later processes read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
OPTIONS = {"enable_fp_fusion": True}  # Triton's versions differ in the default


class Tile(NamedTuple):
    """Two sizes of a tile of work, named by the kernel; and how the compiler is to run it."""

    rows: int
    columns: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """The line of the tables for this device: of an architecture whose instructions and shared memory it has."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def processors(device: torch.device) -> int:
    """How many programs can run at the same time, at the least."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def cache_bytes(device: torch.device) -> int:
    """Of the cache that all programs share; little in the interpreter, so that small tensors fill it."""
    return 1 << 16 if INTERPRETED else torch.cuda.get_device_properties(device).L2_cache_size


def view(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor as kernels take it: with its strides but the last, which is 1."""
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
    """Start a kernel with the first of these tiles, or if tuning was asked for, with the best.

    Args:
        names: what the kernel calls the two sizes of a tile.
        programs: how many programs a tile makes; none are started for empty tensors.
        like: a tensor whose device and dtype are those of the call.
        constants: what else the kernel is compiled for, also other values of OPTIONS.
    """

    def run(tile: Tile) -> None:
        sizes = dict(zip(names, tile, strict=False))
        kernel[(programs(tile),)](
            *arguments, **sizes, num_warps=tile.warps, num_stages=tile.stages, **(OPTIONS | constants)
        )

    if programs(tiles[0]) == 0:
        return
    with torch.cuda.device_of(like):  # Triton starts kernels on the current device
        tile = tiles[0]
        if len(tiles) > 1 and os.environ.get("GPTCORE_TRITON_AUTOTUNE") == "1":
            versions = f"triton {triton.__version__}", torch.cuda.get_device_name(like.device)
            # Without documents or dropout a kernel is another one, with registers to spare.
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
    """How long a kernel takes; infinity where the device has not the registers or the shared memory for it."""
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
