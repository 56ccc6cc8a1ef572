"""The GPU simulator: for each rule a kernel that breaks it, which must be reported, and a correct twin that passes.

Its cases of the operations are picked from their grids (TILES and FEW, made for the tiles of the CUDA kernels).
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import test_attention as attention_grid
import test_gelu as gelu_grid
import test_layer_norm as layer_norm_grid
import torch
from grid import DTYPES, F32

from gptcore import _C, _simt, ops
from tools import mutants

EXAMPLES = _simt.examples()
ORDERS = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(5))]


@pytest.fixture(autouse=True)
def default_configuration() -> Iterator[None]:
    yield
    _simt.configure()
    _simt.reset_counters()


def run(name: str, broken: bool) -> torch.Tensor:
    x = torch.arange(512, dtype=torch.float32).reshape(64, 8)[:, :4]
    out = torch.full((128, 4), torch.nan)
    _simt.run_example(name, broken, x, out)
    return out


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_broken_rule_is_reported_in_any_order_and_its_twin_passes(name: str, order: tuple[str, int]) -> None:
    _simt.configure(order=order[0], seed=order[1])
    with pytest.raises(_simt.SimtError) as report:
        run(name, broken=True)
    run(name, broken=False)
    found = str(report.value).split(" in kernel ")[0]
    # Of two accesses that nothing orders the schedule decides which comes first, and so which of the rules it breaks.
    may_be = {
        "data race": ("data race", "uninitialised read", "unfinished copy"),
        "divergent warp": ("divergent warp", "divergent barrier"),
    }
    assert found in may_be.get(EXAMPLES[name], (EXAMPLES[name],))


def test_a_report_names_kernel_line_block_thread_element_and_rule() -> None:
    with pytest.raises(RuntimeError) as report:
        run("between_the_rows_of_a_view", broken=True)
    assert re.fullmatch(
        r"out of bounds in kernel between_the_rows_of_a_view at csrc/simt/examples\.cu:\d+, "
        r"block \(0, 0, 0\), thread 0: reads 4 bytes at an address between the elements of x of shape \(64, 4\), "
        r"after x\[0, 3\]",
        str(report.value),
    )
    source = Path("csrc/simt/examples.cu").read_text().splitlines()
    line = int(re.search(r"examples\.cu:(\d+)", str(report.value)).group(1))  # type: ignore[union-attr]
    assert "Broken ? 4 : 3" in source[line - 1]


def test_a_race_names_both_places() -> None:
    with pytest.raises(_simt.SimtError) as report:
        run("blocks_write_one_address", broken=True)
    assert re.search(
        r", block \(\d, 0, 0\), thread 0: writes 4 bytes at out\[0, 0\], which thread 0 of block \(\d, 0, 0\) wrote at "
        r"csrc/simt/examples\.cu:\d+, and blocks are not ordered",
        str(report.value),
    )


def test_the_lowest_block_is_reported_whatever_the_threads() -> None:
    for threads in (1, 2, 2, 2):
        _simt.configure(threads=threads)
        with pytest.raises(_simt.SimtError, match=r"block \(0, 0, 0\), thread 0:"):
            run("between_the_rows_of_a_view", broken=True)


def test_after_a_report_the_next_launch_runs() -> None:
    for _ in range(3):
        with pytest.raises(_simt.SimtError):
            run("barrier_of_half_a_warp", broken=True)
        assert run("no_barrier_before_read", broken=False)[:64, 0].tolist() == [8.0 * (i ^ 32) for i in range(64)]


def test_counters() -> None:
    _simt.configure(count=True)
    run("copy_without_barrier", broken=False)
    count = _simt.counters()["copy_without_barrier"]
    assert (count["launches"], count["blocks"], count["barriers"], count["copies"]) == (1, 2, 2, 128)
    assert count["global_read_bytes"] == count["global_write_bytes"] == 128 * 16
    assert (count["global_distinct_read_bytes"], count["global_distinct_write_bytes"]) == (64 * 16, 128 * 16)
    # A thread reads 16 of every 32 bytes of x: a sector each; what it writes is dense.
    assert (count["global_read_sectors"], count["global_write_sectors"]) == (128, 64)
    # Two requests a warp, each of 32 x 16 bytes in four passes of 128 bytes.
    assert (count["shared_requests"], count["shared_passes"], count["bank_conflicts"]) == (8, 32, 0)
    _simt.reset_counters()
    assert _simt.counters() == {}


def test_bank_conflicts_are_counted_and_placed() -> None:
    _simt.configure(count=True)
    run("matrix_row_off_by_one_float", broken=False)
    # A warp stores single floats 32 bytes apart: in 4 banks, 8 passes, 7 too many. The 8 rows of a matrix are as far
    # apart, each in 4 banks: all in 16, 2 passes for each of 4 matrices.
    warps, stores, matrices = 4, 8, 4
    assert _simt.counters()["matrix_row_off_by_one_float"]["bank_conflicts"] == warps * (stores * 7 + matrices)
    places = {place: conflicts for place, conflicts, _ in _simt.waste()["matrix_row_off_by_one_float"]}
    assert sum(places.values()) == warps * (stores * 7 + matrices)
    assert all("examples.cu:" in place for place in places)


def test_special_functions_and_tensor_core_instructions_are_counted() -> None:
    q, k, v = torch.randn(3, 1, 1, 64, 64, dtype=torch.bfloat16)
    ops.attention(q, k, v, backend="simt")
    total = {key: sum(c[key] for c in _simt.counters().values()) for key in ("mma", "special")}
    assert total["mma"] >= 2 * 64 * 64 * 64 // (16 * 8 * 16)
    assert total["special"] >= 64 * 65 // 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"order": "sideways"}, "expected forward, reverse or random"),
        ({"threads": -1}, "expected 0"),
    ],
)
def test_wrong_configurations_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _simt.configure(**arguments)  # type: ignore[arg-type]


# ---- schedules -------------------------------------------------------------------------------------------------------


Results = list[torch.Tensor]


def attention(case: attention_grid.Attention, tf32: bool = False) -> Results:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        run = functools.partial(ops.attention_with_lse, backend="simt", **case.settings())
        return list(attention_grid.attention_results(run, case, case.dtype).values())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def layer_norm(case: layer_norm_grid.LayerNorm) -> Results:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> object:
        return ops.layer_norm(x, weight, bias, eps=case.eps, residual=residual, backend="simt")

    return list(layer_norm_grid.layer_norm_results(run, case).values())


def gelu(case: gelu_grid.Gelu) -> Results:
    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return ops.gelu(x, bias=bias, approximate=case.approximate, backend="simt")

    return list(gelu_grid.gelu_results(run, case).values())


def largest() -> dict[str, Callable[[], Results]]:
    """The largest shape of each kernel in the kernel grid, in each dtype, and tools/mutants.py's grid.

    Attention has one head of keys and two of queries: others are the same program, once more.
    """

    def work(case: attention_grid.Attention) -> int:
        return int(case.seen().sum()) * case.head_dim

    def decodes(case: attention_grid.Attention) -> bool:
        return case.lengths[0] * case.heads[0] <= 16 * case.heads[1]

    calls: dict[str, Callable[[], Results]] = {}
    for dtype in DTYPES:
        attentions = [replace(case, heads=(2, 1)) for case in attention_grid.TILES if case.dtype == dtype]
        calls[f"attention-{dtype}"] = functools.partial(attention, max(attentions, key=work))
        calls[f"decoding-{dtype}"] = functools.partial(attention, max(filter(decodes, attentions), key=work))
        norms = [case for case in layer_norm_grid.FEW if case.dtype == dtype]
        for wide in (False, True):
            most = max((case for case in norms if (case.width > 12288) == wide), key=lambda c: c.rows * c.width)
            calls[f"layer_norm{'_wide' * wide}-{dtype}"] = functools.partial(layer_norm, most)
        gelus = [case for case in gelu_grid.FEW if case.dtype == dtype]
        calls[f"gelu-{dtype}"] = functools.partial(gelu, max(gelus, key=lambda case: math.prod(case.shape)))
        if dtype == F32:
            calls["attention-tf32"] = functools.partial(attention, max(attentions, key=work), tf32=True)
    for family, grid in mutants.GRID.items():
        calls[f"mutants-{family}"] = lambda grid=grid: [t.detach() for call in grid for t in call()]  # type: ignore[misc]
    return calls


LARGEST = largest()


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST)
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    first = LARGEST[name]()
    for order, seed in ORDERS[1:4]:  # reverse and two at random: races are reported whatever the order
        _simt.configure(order=order, seed=seed)
        for a, b in zip(first, LARGEST[name](), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), (order, seed)


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in _C.supported_isas(), reason="this processor has no fused multiply-add")
def test_the_grid_holds_where_the_compiler_fuses_multiply_and_add(tmp_path: Path) -> None:
    """nvcc does, where the model's own flags forbid it."""
    _, module = mutants.build([], tmp_path, ("layer_norm", "gelu"), ("-mfma", "-ffp-contract=fast"))
    run = "import pytest, sys; from tools.mutants import load; load(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
    tests = "tests/test_layer_norm.py", "tests/test_gelu.py", "-qk", "simt"
    done = subprocess.run([sys.executable, "-c", run, module, *tests], cwd=mutants.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
