"""A linear layer over weights in GGUF's blocks of 32 numbers, q8_0 or q4_0, in Triton.

Weights are decoded in registers, so a weight is read from memory once for each tile of rows. Their integers are exact
in every dtype of x; the scale of a block multiplies its part of the sum, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptcore.kernels.launch import INTERPRETED, Tile, launch
from gptcore.kernels.numerics import dot, narrow
from gptcore.kernels.rows import rows_and_width

BLOCK = tl.constexpr(32)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x,  # * (rows, blocks * 32)
    weight,  # *uint8 (outputs, blocks * BYTES)
    bias,  # * (outputs,) or None
    out,  # * (rows, outputs): written
    rows,
    outputs,
    blocks,
    BYTES: tl.constexpr,  # of a block: 34 with 8 bits a number, 18 with 4
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(outputs, COLUMNS)
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    k = tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(blocks):
        at = weight + (column.to(tl.int64) * blocks + block) * BYTES
        low = tl.load(at, mask=inside, other=0).to(tl.uint16)
        high = tl.load(at + 1, mask=inside, other=0).to(tl.uint16)
        scale = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        if BYTES == 34:
            bits = tl.load(at[None, :] + 2 + k[:, None], mask=inside[None, :], other=0)
            numbers = bits.to(tl.int8, bitcast=True).to(tl.float32)  # (32, COLUMNS)
        else:
            bits = tl.load(at[None, :] + 2 + (k % 16)[:, None], mask=inside[None, :], other=0)
            numbers = ((bits >> (k // 16 * 4)[:, None].to(tl.uint8)) & 15).to(tl.float32) - 8.0
        part = tl.load(x + row.to(tl.int64) * (blocks * BLOCK) + block * BLOCK + k[None, :], mask=row < rows, other=0.0)
        product = dot(part, numbers.to(part.dtype), tl.zeros((ROWS, COLUMNS), tl.float32), "ieee")
        acc += product * scale[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    offsets = row.to(tl.int64) * outputs + column[None, :]
    tl.store(out + offsets, narrow(acc, out.dtype.element_ty), mask=(row < rows) & inside[None, :])


# The arguments are those of the native function quantized_linear_forward, which checks them.


def forward(x: Tensor, weight: Tensor, kind: str, bias: Tensor | None, out: Tensor) -> None:
    """Write out."""
    rows, width = rows_and_width(x)
    outputs, bytes = weight.shape[0], {"q8_0": 34, "q4_0": 18}[kind]
    launch(
        _kernel, [Tile(64, 64, 4, 2) if INTERPRETED else Tile(16, 64, 4, 3)], ("ROWS", "COLUMNS"),
        lambda tile: triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns),
        x, weight, bias, out, rows, outputs, width // 32, like=x, BYTES=bytes,
    )  # fmt: skip
