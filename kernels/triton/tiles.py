"""The tiles of attention: (queries, keys, warps, stages), by architecture, dtype and head_dim.

Those of sm_90 for 16 bits were the fastest on an H200, though some spill. The others are the largest that spill no
register and fit the shared memory of the smallest GPU of their row, according to the compiler (tools/triton_table.py);
they were not measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptcore.kernels.launch import Tile, architecture

# For a head_dim of up to 64, 128 and 256.
Row = tuple[Tile, Tile, Tile]


def _row(*tiles: tuple[int, int, int, int]) -> Row:
    small, middle, large = tiles
    return Tile(*small), Tile(*middle), Tile(*large)


# The first row is for 16 bits, the second for 32.
TILES: dict[str, dict[str, tuple[Row, Row]]] = {
    "sm_80": {  # also sm_86, sm_89 and sm_120, with 99 KB of shared memory
        "forward": (
            _row((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
            _row((64, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
        ),
        "dq": (
            _row((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 1)),
            _row((32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
        ),
        "dkdv": (
            _row((32, 64, 4, 3), (64, 64, 8, 2), (32, 32, 8, 1)),
            _row((32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        ),
    },
    "sm_90": {
        "forward": (
            _row((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
            _row((64, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
        ),
        "dq": (
            _row((64, 32, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
            _row((32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
        ),
        "dkdv": (
            _row((32, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 2)),
            _row((32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        ),
    },
    "sm_100": {
        "forward": (
            _row((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
            _row((64, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1)),
        ),
        "dq": (
            _row((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
            _row((32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
        ),
        "dkdv": (
            _row((32, 64, 4, 2), (64, 128, 8, 1), (32, 32, 8, 1)),
            _row((32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        ),
    },
    "gfx942": {
        "forward": (
            _row((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 1)),
            _row((64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
        ),
        "dq": (
            _row((128, 64, 8, 2), (64, 32, 4, 1), (32, 32, 4, 1)),
            _row((32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
        ),
        "dkdv": (
            _row((64, 64, 4, 2), (32, 64, 4, 1), (16, 32, 4, 1)),
            _row((32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 1)),
        ),
    },
    "interpreter": {  # queries and keys differ, so that tests notice a mix-up
        "forward": (_row(*((128, 64, 1, 1),) * 3),) * 2,
        "dq": (_row(*((64, 128, 1, 1),) * 3),) * 2,
        "dkdv": (_row(*((128, 64, 1, 1),) * 3),) * 2,
    },
}


def tiles(kernel: str, q: Tensor) -> list[Tile]:
    """Return the tiles of the table for a tensor: the default first, then the others for autotuning."""
    rows = TILES[architecture(q.device)][kernel][q.dtype == torch.float32]
    best = rows[(q.shape[3] > 64) + (q.shape[3] > 128)]
    return [best, *(tile for tile in rows if tile != best)]
