"""Memory traffic and tensor-core work of the CUDA kernels, counted in the simulator, and the bounds that they imply.

A bound is the time at the peak rates of a GPU's data sheet, not a measurement: a kernel can be slower, never faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore import ops
from gptcore.files import atomic_file

S, D = 1024, 64  # sequence length and head_dim of the counted attention: one head, causal, bfloat16
BATCH, HEADS, WIDTH = 16, 12, 768  # the GPT-2 layer that the bounds are for
# Layer norm is counted on all rows of the layer: weight, bias and partial sums of each block would be over 2 % of the
# traffic of 1024 rows.
ROWS, GELU_ROWS = BATCH * S, S  # bfloat16
MMA_FLOPS = 2 * 16 * 8 * 16  # of one m16n8k16


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU from its data sheet, at the boost clock."""

    name: str
    bytes_per_second: float
    flops: float  # of 16-bit tensor cores, dense
    special_per_second: float  # exponentials and other special functions: 16 a clock on each multiprocessor


GPUS = (
    Gpu("A100 80GB SXM", 2.039e12, 312e12, 108 * 16 * 1.41e9),
    Gpu("H100 SXM", 3.35e12, 989e12, 132 * 16 * 1.83e9),
)


@dataclass(frozen=True)
class Case:
    """One operation, with its expected memory traffic and instructions."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None  # runs first and is not counted
    once: int  # bytes: every tensor of the operation read or written once
    schedule: int  # bytes that the tiles load and store by design
    mma: int  # tensor-core instructions for all tiles that a block visits
    copies: int  # number of such inputs in a GPT-2 layer


@dataclass(frozen=True)
class Count:
    """A case with the counts of the simulator."""

    case: Case
    bytes: int
    distinct: int
    mma: int
    bank_conflicts: int
    special: int
    barriers: int

    def bound(self, gpu: Gpu) -> tuple[float, str]:
        """Return the minimum seconds for one GPT-2 layer, and the resource that limits it."""
        times = {
            "memory": self.case.once / gpu.bytes_per_second,
            "tensor cores": self.mma * MMA_FLOPS / gpu.flops,
            "exponentials": self.special / gpu.special_per_second,
        }
        busy = max(times, key=times.__getitem__)
        return times[busy] * self.case.copies, busy


def _attention_cases() -> Iterator[Case]:
    from gptcore import _simt

    tiles = _simt.tiles(D, 2)
    forward, tile = tiles["forward"], tiles["backward"]
    assert isinstance(forward, tuple)
    assert isinstance(tile, tuple)
    row, stats = D * 2, 4  # bytes of a row of a tensor, and of its LSE or delta

    def visited(rows: int, columns: int, transposed: bool = False) -> tuple[int, int]:
        """Return the number of columns visited, and of tiles; transposed: queries visited by tiles of keys."""
        seen = [(S - begin // columns * columns if transposed else min(S, begin + rows)) for begin in range(0, S, rows)]
        return sum(seen), sum(-(-count // columns) for count in seen)

    def product(rows: int, columns: int) -> int:
        return rows * columns * D // (16 * 8 * 16)

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, S, D).bfloat16().requires_grad_() for _ in range(3))
    columns, count = visited(*forward)
    yield Case(
        "attention forward",
        run=lambda: ops.attention(q.detach(), k.detach(), v.detach(), backend="simt"),
        prepare=None,
        once=S * (4 * row + stats),
        schedule=S * (2 * row + stats) + columns * 2 * row,
        mma=count * 2 * product(*forward),
        copies=BATCH * HEADS,
    )
    saved: list[Tensor] = []
    by_query, by_key = visited(*tile), visited(*tile, transposed=True)
    delta = S * (2 * row + stats)
    queries = S * (3 * row + 2 * stats) + by_query[0] * 2 * row
    keys = S * 4 * row + by_key[0] * 2 * (row + stats)
    yield Case(
        "attention backward",
        run=lambda: saved.pop().backward(torch.ones(1, 1, S, D).bfloat16()),
        prepare=lambda: saved.append(ops.attention(q, k, v, backend="simt")),
        once=S * (8 * row + stats),
        schedule=delta + queries + keys,
        mma=(by_query[1] * 3 + by_key[1] * 4) * product(*tile),
        copies=BATCH * HEADS,
    )
    one = torch.randn(1, 1, 1, D).bfloat16()
    yield Case(
        "attention, one query",
        run=lambda: ops.attention(one, k.detach(), v.detach(), backend="simt"),
        prepare=None,
        once=(2 * S + 2) * row + stats,
        schedule=(2 * S + 2) * row + stats,
        mma=0,  # 15 of the 16 rows of its tile are padding, so there is no minimum to compare with
        copies=BATCH * HEADS,
    )


def _row_cases() -> Iterator[Case]:
    torch.manual_seed(0)
    all_rows, grad, residual = (torch.randn(ROWS, WIDTH).bfloat16() for _ in range(3))
    weight, bias = torch.ones(WIDTH), torch.zeros(WIDTH)
    saved: list[Any] = []

    def case(
        name: str, forward: Callable[..., Any], rows: int, passes: int, back: int, once: int, width: int
    ) -> Iterator[Case]:
        x = all_rows[:rows]
        one = x.numel() * 2  # bytes of one tensor
        copies = BATCH * S * width // x.numel()
        leaf = x.clone().requires_grad_()
        yield Case(name + " forward", lambda: forward(x), None, passes * one + once, passes * one, 0, copies)
        yield Case(
            name + " backward",
            run=lambda: torch.autograd.backward(saved[0], [grad[:rows], residual][: len(saved.pop())]),
            prepare=lambda: saved.append([*forward(leaf)]),
            once=back * one + once,
            schedule=back * one,
            mma=0,
            copies=copies,
        )

    stats, vectors = 2 * 4 * ROWS, 2 * 4 * WIDTH
    weight.requires_grad_()
    bias.requires_grad_()
    yield from case(
        "layer norm", lambda t: (ops.layer_norm(t, weight, bias, backend="simt"),), ROWS, 2, 3, stats + vectors, WIDTH
    )
    yield from case(
        "layer norm with residual",
        lambda t: ops.layer_norm(t, weight, bias, residual=residual, backend="simt"),
        ROWS, 4, 4, stats + vectors, WIDTH,
    )  # fmt: skip
    yield from case("GELU", lambda t: (ops.gelu(t, backend="simt"),), GELU_ROWS, 2, 3, 0, 4 * WIDTH)


def count() -> Iterator[Count]:
    """Yield the counts of every case. Raises RuntimeError if the simulator is not built or reports an error."""
    with ops.use("simt"):  # raises if it cannot be used
        from gptcore import _simt
    _simt.configure(count=True)
    try:
        for case in (*_attention_cases(), *_row_cases()):
            if case.prepare:
                case.prepare()
            _simt.reset_counters()
            case.run()
            kernels = _simt.counters().values()

            def total(*names: str, kernels: Any = kernels) -> int:
                return sum(kernel[name] for kernel in kernels for name in names)

            yield Count(
                case,
                bytes=total("global_read_bytes", "global_write_bytes"),
                distinct=total("global_distinct_read_bytes", "global_distinct_write_bytes"),
                mma=total("mma"),
                bank_conflicts=total("bank_conflicts"),
                special=total("special"),
                barriers=total("barriers"),
            )
    finally:
        _simt.configure()


def table(counts: list[Count]) -> str:
    """Return a Markdown table of the counts, then one of the bounds that follow."""
    lines = [
        f"Inputs (bfloat16): attention, one causal head of {S} x {D}; layer norm, {ROWS} x {WIDTH}; GELU,",
        f"{GELU_ROWS} x {WIDTH}. *Global bytes* are all that threads load and store, *schedule* is what the tiles load",
        "and store by design. *Distinct bytes* count each address once per kernel launch, *tensors* per operation:",
        "the three launches of the attention backward read the same inputs. The mma are also divided by those of all",
        "tiles that a block visits, and warps skip the tiles that no row of theirs attends to.",
        "",
        "| operation | global bytes | schedule | ratio | distinct bytes | tensors | ratio | mma | mma / visited "
        "tiles | bank conflicts | special functions |",
        "| --- |" + " --: |" * 10,
    ]
    for c in counts:
        mma = f"{c.mma / c.case.mma:.2f}" if c.case.mma else ""
        lines.append(
            f"| {c.case.name} | {c.bytes:,} | {c.case.schedule:,} | {c.bytes / c.case.schedule:.3f} | {c.distinct:,} | "
            f"{c.case.once:,} | {c.distinct / c.case.once:.3f} | {c.mma:,} | {mma} | {c.bank_conflicts:,} | "
            f"{c.special:,} |"
        )
    lines += [
        "",
        f"Lower bounds on the time of one layer of GPT-2 124M, batch {BATCH} x {S}, and the limiting resource,",
        "computed from data sheets, not measured.",
        "",
        "| operation | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "| --- |" + " --: |" * len(GPUS),
    ]
    for c in counts:
        cells = (f"{seconds * 1e6:,.0f} µs ({busy})" for seconds, busy in map(c.bound, GPUS))
        lines.append(f"| {c.case.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


BEGIN, END = "<!-- counters -->", "<!-- end of counters -->"


def write(path: Path, counts: list[Count]) -> None:
    """Write the tables between the two markers of a document. Raises ValueError if a marker is missing."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} ... {END} to write between")
    with atomic_file(path) as file:
        file.write_text(f"{before}{BEGIN}\n{table(counts)}\n{END}{after}")


if __name__ == "__main__":
    measured = list(count())
    print(table(measured))
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), measured)
