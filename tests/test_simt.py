"""The model of a GPU itself: each rule has a kernel that breaks it, which must be reported, and a twin that passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptcore import _simt, ops
from tests import mutants

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
        run("blocks_write_one_place", broken=True)
    assert re.search(
        r", block \(\d, 0, 0\), thread 0: writes 4 bytes at out\[0, 0\], which thread 0 of block \(\d, 0, 0\) wrote at "
        r"csrc/simt/examples\.cu:\d+, and nothing orders blocks",
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


@pytest.mark.parametrize("family", mutants.GRID)
def test_every_schedule_gives_the_same_bits(family: str) -> None:
    def everything() -> list[torch.Tensor]:
        return [tensor.detach() for call in mutants.GRID[family] for tensor in call()]

    first = everything()
    for order, seed in ORDERS[1:]:
        _simt.configure(order=order, seed=seed)
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), (order, seed)
