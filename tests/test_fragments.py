"""Which lane holds which element of a tensor-core operand, against the layouts of the PTX ISA in CuTe's algebra.

A layout is a shape and strides, ((4, 8), (2, 2, 2)):((32, 1), (16, 8, 128)) say: an index is written in the mixed
radix of the shape, first digit fastest, and its digits are multiplied with the strides. The first mode is the lane, the
second the element that it holds, the result the place in the column-major matrix. csrc/simt/warp.cpp says the same with
rows and columns of groups of four lanes.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gptcore import _simt

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape, strides


def at(layout: Layout, index: int) -> int:
    place = 0
    for size, stride in zip(*layout, strict=True):
        place += index % size * stride
        index //= size
    return place


# (lane, element) -> m + 16 k, n + 8 k, m + 16 n; of 16-bit elements two are in a word, the first in its lower half.
MMA_16816: dict[str, tuple[Layout, Layout]] = {
    "a": (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128))),
    "b": (((4, 8), (16, 1)), ((2, 2), (8, 64))),
    "d": (((4, 8), (32, 1)), ((2, 2), (16, 8))),
}
MMA_1688: dict[str, tuple[Layout, Layout]] = {
    "a": (((4, 8), (16, 1)), ((2, 2), (8, 64))),
    "b": (((4, 8), (8, 1)), ((2,), (32,))),
    "d": (((4, 8), (32, 1)), ((2, 2), (16, 8))),
}
# (lane, half of its word) -> the element of a row-major 8x8 matrix.
LOAD_MATRIX: tuple[Layout, Layout] = (((32,), (2,)), ((2,), (1,)))
LOAD_MATRIX_TRANS: tuple[Layout, Layout] = (((4, 8), (16, 1)), ((2,), (8,)))


def distribute(matrix: torch.Tensor, layout: tuple[Layout, Layout]) -> torch.Tensor:
    """The elements that each lane holds: (32, elements)."""
    elements = math.prod(layout[1][0])
    column_major = matrix.T.reshape(-1)
    places = [[at(layout[0], lane) + at(layout[1], i) for i in range(elements)] for lane in range(32)]
    return column_major[torch.tensor(places)]


def run(op: str, words: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(32, 4, dtype=torch.int32)
    _simt.run_fragments(op, words, out)
    return out


@pytest.mark.parametrize(
    ("op", "dtype", "layouts", "depth"),
    [
        ("mma_bfloat16", torch.bfloat16, MMA_16816, 16),
        ("mma_float16", torch.float16, MMA_16816, 16),
        ("mma_tf32", torch.float32, MMA_1688, 8),
    ],
)
def test_mma(op: str, dtype: torch.dtype, layouts: dict[str, tuple[Layout, Layout]], depth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: every sum is exact, in whatever order.
    a, b, d = (torch.randint(-8, 9, s, generator=generator).float() for s in ((16, depth), (depth, 8), (16, 8)))
    held_a = distribute(a.to(dtype), layouts["a"]).view(torch.int32)
    held_b = distribute(b.T.to(dtype), layouts["b"]).view(torch.int32)  # n is the first coordinate of b's layout
    held_d = distribute(d, layouts["d"]).view(torch.int32)
    got = run(op, torch.cat([held_a, held_b, held_d], dim=1)).view(torch.float32)
    assert torch.equal(got, distribute(a @ b + d, layouts["d"]))


def test_mma_tf32_does_not_see_the_last_13_bits() -> None:
    words = torch.zeros(32, 10, dtype=torch.int32)
    words[:, :6] = torch.tensor(1.0).view(torch.int32) | 0x1FFF
    assert torch.equal(run("mma_tf32", words).view(torch.float32), torch.full((32, 4), 8.0))


@pytest.mark.parametrize(("op", "layout"), [("load_matrix", LOAD_MATRIX), ("load_matrix_trans", LOAD_MATRIX_TRANS)])
def test_load_matrix(op: str, layout: tuple[Layout, Layout]) -> None:
    matrices = torch.arange(4 * 64, dtype=torch.int16).reshape(4, 64)
    words = torch.zeros(32, 10, dtype=torch.int32)
    words[:, :4] = matrices.reshape(32, 8).view(torch.int32)  # lane 8 i + r gives row r of matrix i
    got = run(op, words).view(torch.int16).reshape(32, 4, 2)
    for lane, matrix, half in itertools.product(range(32), range(4), range(2)):
        assert got[lane, matrix, half] == matrices[matrix, at(layout[0], lane) + at(layout[1], half)]
