"""The CUDA kernels as compiled: no spills, no stack, no float64, and nothing worse than tools/data/sass.json says."""

import os

import pytest

from gptcore import _C
from tools import sass
from tools.sass_loops import main_loop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table() -> sass.Table:
    if not _C.cuda_archs() and os.environ.get("GPTCORE_CUDA", "AUTO").upper() != "ON":
        pytest.skip(str(_C.cuda_problem()))
    return sass.measure()


def test_every_kernel_is_compiled_for_every_architecture(table: sass.Table) -> None:
    archs = {arch for arch in _C.cuda_archs() if arch.startswith("sm_")}
    assert archs
    hopper = {name for name in table if "<Warpgroup<" in name}
    assert {frozenset(rows) for name, rows in table.items() if name not in hopper} == {frozenset(archs)}
    assert {frozenset(table[name]) for name in hopper} == {frozenset({"sm_90a"})} or "sm_90" not in archs


def test_no_kernel_spills_or_uses_float64_or_lacks_what_it_is_made_of(table: sass.Table) -> None:
    assert sass.problems(table) == []


def test_no_number_is_worse_than_the_table_says(table: sass.Table) -> None:
    nvcc, before = sass.load()
    if nvcc != sass.compiler():
        pytest.skip(f"the table is for nvcc {nvcc}, the module was built by {sass.compiler()}")
    assert sass.worsened(table, before) == []


def test_the_documentation_shows_the_table() -> None:
    text = sass.DOCS.read_text()
    assert sass.documented(text, sass.load()[1]) == text


def test_the_gate_can_fail() -> None:
    row = dict.fromkeys(sass.FIELDS, 1) | {"stack": 0, "local": 0, "fp64": 0}
    before = {"layer_norm": {"sm_80": row}}
    assert sass.problems(before) == sass.worsened(before, before) == []
    for field in (*sass.MORE_IS_WORSE, *sass.LESS_IS_WORSE):
        change = 1 if field in sass.MORE_IS_WORSE else -1
        after = {"layer_norm": {"sm_80": row | {field: row[field] + change}}}
        assert sass.worsened(after, before) == [f"layer_norm sm_80: {field} was {row[field]}, is {row[field] + change}"]
        assert sass.worsened(before, after) == []
    for field, bad in (("stack", 8), ("local", 2), ("fp64", 1), ("wide", 0)):
        assert len(sass.problems({"layer_norm": {"sm_80": row | {field: bad}}})) == 1
    assert sass.worsened({}, before) == ["layer_norm is gone"]
    assert sass.worsened(before, {}) == ["layer_norm is new"]


def test_the_main_loop_is_the_pass_with_all_loads_and_products_and_no_exceptions() -> None:
    code = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDGSTS.E.128 [R1], desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FSEL R3, R3, -INF , P1 ;
.L_x_2:
        /*0040*/              @!P1 BRA `(.L_x_3) ;
        /*0050*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
.L_x_5:
        /*0080*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0090*/               @P3 BRA `(.L_x_5) ;
.L_x_4:
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""
    names = [name.split(".")[0] for name in main_loop(code.splitlines())]
    assert names == ["LDGSTS", "BRA", "BRA", "LDSM", "HMMA", "IADD3", "BRA", "BRA"]
    of_warpgroups = main_loop(code.replace("HMMA.16816", "HGMMA.64x64x16").splitlines())
    assert [name.split(".")[0] for name in of_warpgroups] == [name.replace("HMMA", "HGMMA") for name in names]
    assert main_loop(["        /*0000*/                   EXIT ;"]) == []
