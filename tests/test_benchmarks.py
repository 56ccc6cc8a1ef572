"""The benchmark suite: its statistics, its report, its check, and that all of it runs at toy sizes."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import charts, check, goals, measure, readme, report, tables
from benchmarks.measure import Limit, Spread, row, spread, verdict

ROOT = Path(__file__).parents[1]


def results_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": tables.SCHEMA,
        **measure.environment(),
        "limits": {"copy": {"unit": "B/s", "rate": [30e9, 29e9, 31e9], "rounds": 3}},
        "rows": list(rows),
    }


def gelu_row(ours: list[float], reference: list[float]) -> dict[str, Any]:
    copying = Limit("copy", lambda: None, 1, "B")
    return row(
        "GELU forward + backward float32", "tanh, 4096 x 3072", ours, reference,
        against="PyTorch", limit=copying, rates=[30e9] * len(ours), bytes=252e6, flops=4e8,
    )  # fmt: skip


# ---- statistics


def test_spread_is_the_quartiles_or_for_few_values_the_extremes() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 900.0]) == Spread(5, 3, 7)  # one outlier moves nothing
    assert spread([3.0, 1.0, 2.0]) == Spread(2, 1, 3)
    assert spread([4.0]) == Spread(4, 4, 4)
    with pytest.raises(ValueError, match="spread of an empty sequence"):
        spread([])


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (Spread(2.0, 1.9, 2.1), "met"),
        (Spread(1.8, 1.8, 1.9), "met"),
        (Spread(1.9, 1.7, 2.1), "met, within the spread"),
        (Spread(1.7, 1.6, 1.9), "missed, within the spread"),
        (Spread(1.7, 1.6, 1.79), "missed"),
    ],
)
def test_verdict(measured: Spread, expected: str) -> None:
    assert verdict(measured, 1.8) == expected


def test_plan_gives_quick_calls_many_and_slow_ones_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BLOCK", 0.02)
    monkeypatch.setattr(measure, "BUDGET", 2.0)
    monkeypatch.setattr(measure, "ROUNDS", (3, 15))
    assert measure.plan(0, pair=15, once=5) == (3, 1)
    assert measure.plan(0, pair=3e-3, once=1e-3) == (15, 20)
    assert measure.plan(0.1, pair=0.3, once=0.1) == (5, 1)
    assert measure.plan(0.1, pair=5e-3, once=1e-3) == (10, 20)  # the limit runs once a round, however many calls


def test_row_takes_ratio_and_percent_within_each_round() -> None:
    # the machine is half as fast in the second round, for all three: neither ratio nor percentage may notice
    limit = Limit("copy", lambda: None, 1, "B")
    line = row("g", "c", [1.0, 2.0], [3.0, 6.0], against="x", limit=limit, rates=[10.0, 5.0], bytes=8)
    assert line["ratio"] == [3, 3, 3]
    assert line["percent"] == [80, 80, 80]
    with pytest.raises(ValueError, match="amount of work in B, but it is 0"):
        row("g", "c", [1.0], [3.0], against="x", limit=limit, rates=[10.0])


def test_limit_measures_a_rate() -> None:
    limit = measure.copy()
    assert limit.rate() > 0
    assert measure.limits()["copy"]["unit"] == "B/s"


class FixedRate(Limit):
    def rate(self) -> float:
        return self.amount


def test_the_slower_of_reading_and_computing_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "read", lambda: FixedRate("read", lambda: None, 10, "B"))
    arithmetic = FixedRate("matmul", lambda: None, 100, "FLOP")
    assert measure.Slower(arithmetic, bytes=20, flops=50).rate() == 0.5
    limit = measure.Slower(arithmetic, bytes=1, flops=500)
    assert limit.rate() == 0.2
    line = row("g", "c", [10.0], [20.0], against="x", limit=limit, rates=[0.2], bytes=1, flops=500)
    assert line["percent"] == [50, 50, 50]
    assert line["limit"] == "the slower of read and matmul"


# ---- goals


def test_goals_are_about_the_rows_they_name() -> None:
    line = gelu_row([0.010] * 3, [0.043] * 3)
    by_ratio, by_percent = goals.outcomes(line, "avx2")
    assert (by_ratio.goal, by_ratio.unit, by_ratio.verdict) == (4, "x", "met")
    assert (by_percent.goal, by_percent.unit, by_percent.verdict) == (85, "%", "missed")
    assert goals.outcomes({**line, "group": "toy " + line["group"]}, "avx2") == []
    line |= {"group": "attention forward + backward bfloat16", "case": "D=64 S=256"}
    assert [(goal.goal, goal.unit) for goal in goals.outcomes(line, "avx512_bf16")] == [(3, "x"), (60, "%")]
    assert [(goal.goal, goal.unit) for goal in goals.outcomes(line, "avx2")] == [(85, "%"), (4, "x")]


# ---- report


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.00123456, "s", "1.23 ms"), (0.0999, "s", "99.9 ms"), (0.9999, "s", "1.00 s"), (171e9, "FLOP/s", "171 GFLOP/s")],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert tables.quantity(value, unit) == text


def test_tables_say_what_is_met_missed_and_lost_in_the_spread() -> None:
    results = results_of(gelu_row([0.010] * 3, [0.043] * 3))
    _, cells = tables.table(results)
    assert cells[2:] == [
        "10.0 ms", "43.0 ms, PyTorch", "4.30 x (4.30 to 4.30)", "84 % (84 to 84) of copy", "4 x met; 85 % missed",
    ]  # fmt: skip
    assert tables.shortfalls(results)[0] == "1 of 2 goals met"
    assert "84.00 of 85 %" in tables.shortfalls(results)[1]
    slow = results_of(gelu_row([0.010] * 3, [0.030] * 3))
    assert tables.shortfalls(slow)[1].endswith("3.00 of 4 x; the whole of copy would be 3.57 x")
    assert tables.shortfalls(slow)[2].endswith("84.00 of 85 %")
    assert "no difference beyond the spread" in tables.times([1.02, 0.97, 1.05])
    assert "no difference" not in tables.times([1.06, 1.02, 1.1])


def test_what_is_missed_names_what_stops_it() -> None:
    def attention(group: str, ours: float, theirs: float, percent: float | None) -> dict[str, Any]:
        line = gelu_row([ours] * 3, [theirs] * 3)
        limit = {"limit": "matmul bfloat16", "percent": percent and [percent] * 3}
        return {**line, "group": f"{group} bfloat16", "case": "D=64 S=1024", **limit}

    rest = attention("attention without its matmuls, forward", 0.010, 0.004, None)
    results = results_of(attention("attention forward", 0.010, 0.030, 80.0), rest)
    words = "3.00 of 3.3 x; the whole of matmul bfloat16 and the rest at its own speed would be 2.50 x"
    assert tables.shortfalls(results)[1].endswith(words)
    assert tables.shortfalls(results_of(results["rows"][0]))[1].endswith("the whole of matmul bfloat16 would be 3.75 x")
    memory = {**rest, "group": "peak memory of a GPT-2 124M step float32", "case": "batch 4 x 256"}
    assert tables.shortfalls(results_of(memory))[1].endswith("0.40 of 1 x")


def test_results_of_several_processes_are_joined() -> None:
    first, second = results_of(gelu_row([0.010], [0.043])), results_of(gelu_row([0.020], [0.050]))
    second["limits"] = {"copy": {"unit": "B/s", "rate": [20e9] * 3, "rounds": 9}, "read": first["limits"]["copy"]}
    both = tables.joined([first, second])
    assert both["rows"] == first["rows"] + second["rows"]
    assert both["limits"] == second["limits"]  # more rounds
    assert both["date"] == first["date"]


def test_insert_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    begin, end = readme.BEGIN.format("part"), readme.END.format("part")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert readme.insert(text, "part", "new \\1") == f"before\n{begin}\nnew \\1\n{end}\nafter\n"
    assert readme.insert(readme.insert(text, "part", "x"), "part", "y") == readme.insert(text, "part", "y")
    for broken in ("nothing", f"{end}\n{begin}", text + begin):
        with pytest.raises(ValueError, match="once each"):
            readme.insert(broken, "part", "new")


def test_the_readme_shows_ratios_and_names_what_is_slower(tmp_path: Path) -> None:
    def named(group: str, case: str, ours: float, theirs: float, against: str = "PyTorch") -> dict[str, Any]:
        extra = {axis: int(number) for axis, number in re.findall(r"([DS])=(\d+)", case)}
        line = gelu_row([ours] * 3, [theirs] * 3)
        return {**line, "group": group, "case": case, "against": against, "extra": extra, "limit": "copy"}

    rows = [
        named("attention forward + backward float32", "D=64 S=1024", 1.0, 1.5),
        named("attention forward + backward float32", "D=64 S=256", 1.0, 1.5),
        named("attention forward + backward bfloat16", "D=64 S=1024", 1.0, 3.0),
        named("attention forward + backward bfloat16", "D=64 S=256", 1.0, 4.0),
        named("attention forward float32", "D=128 S=4096", 1.0, 0.9),
        named("attention forward bfloat16", "D=64 S=1024", 1.0, 0.5, against="ops.attention"),  # not another's code
        named("GPT-2 124M training step float32", "batch 4 x 256", 2.0, 3.0, against="transformers"),
        named("GPT-2 124M training step bfloat16 autocast", "batch 4 x 256", 2.0, 3.4, against="transformers"),
    ]
    results = {**results_of(*rows), "cpu": "CPU", "threads": 2, "isa": "avx512_bf16"}
    text = readme.summary(results, tmp_path)
    assert "| attention, forward + backward | 1.50 | 3.00 to 4.00 | PyTorch |" in text
    assert "| GPT-2 124M training step | 1.50 | 1.70 | transformers |" in text
    assert "Slower than the reference on CPU: attention forward float32 (0.90 times as fast as PyTorch)." in text
    claims = readme.claims(results, tmp_path)
    assert ", 256 to 1,024 tokens, head_dim 64: 3.00 to 4.00 times as fast as PyTorch " in claims
    assert " in bfloat16 and 1.50 in float32 on CPU (AVX-512 BF16, 2 threads)." in claims
    assert "†" not in claims
    (tmp_path / "other").mkdir()
    other = {**results, "cpu": "Other", "rows": rows[1:]}  # it lacks a case of attention
    (tmp_path / "other" / "results.json").write_text(json.dumps(other))
    assert ["Other" in line for line in readme.claims(results, tmp_path).splitlines()] == [False, True]
    (tmp_path / "other" / "results.json").unlink()
    for measured in rows:  # quartiles that include 1
        measured["ratio"] = [measured["ratio"][0], 0.9, 5.0]
    assert "3.00 to 4.00† times as fast" in readme.claims(results, tmp_path)
    assert "| attention, forward + backward | 1.50† | 3.00 to 4.00† | PyTorch |" in readme.summary(results, tmp_path)
    charts.draw(results, tmp_path)
    assert (tmp_path / "headline.png").stat().st_size > 10_000
    charts.draw({**results, "rows": rows[:1]}, tmp_path / "nothing")
    assert not (tmp_path / "nothing" / "headline.png").exists()


def test_the_claim_on_a_gpu_names_both_backends() -> None:
    times = {"gptcore cuda": 2.0, "gptcore triton": 1.0, "SDPA flash": 1.5, "SDPA cudnn": 0.5, "x": None}
    line = {"op": "attention", "case": "GPT (8, 12, 1024, 64)", "pass": "forward"}
    found = {"gpu": "GPU", "torch": "2+cu", "rows": [{**line, "name": name, "ms": ms} for name, ms in times.items()]}
    claim = readme.claim_on_gpu(found)
    assert "Triton kernels are 1.50 times as fast as FlashAttention-2 in PyTorch 2, the CUDA kernels 0.75" in claim
    assert claim.endswith("relative to cuDNN, 0.50 and 0.25 times")
    assert readme.gpu_ratios(found, "gptcore cuda", "x") == []


def test_load_refuses_another_schema(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        tables.load(tmp_path / "results.json")


def test_committed_report_is_what_the_committed_results_say() -> None:
    """README.md and benchmarks/results/README.md are generated: editing them, or results without them, fails here."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    results = tables.load(tables.COMMITTED / "results.json")
    assert not results["form"].startswith("toy")
    assert readme.readme(page, results) == page
    more = "".join(part(tables.COMMITTED) for part in (report.of_other_runs, report.on_other_machines, report.on_a_gpu))
    assert (tables.COMMITTED / "README.md").read_text(encoding="utf-8") == report.full(results) + more
    for other in tables.elsewhere(tables.COMMITTED):
        assert other.with_name("README.md").read_text(encoding="utf-8") == report.full(tables.load(other))


def test_the_results_of_another_machine(tmp_path: Path) -> None:
    here = {**results_of(gelu_row([0.010], [0.043])), "isa": "avx2"}
    there = {**results_of(gelu_row([0.020], [0.030])), "isa": "amx_bf16"}
    for folder, results in ((tmp_path, here), (tmp_path / "amx", there)):
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results))
    assert "amx_bf16 kernels: [amx](amx/README.md), 0 of 2 goals met" in report.on_other_machines(tmp_path)
    assert "](benchmarks/results/amx/README.md)" in readme.summary(here, tmp_path)
    assert check.like(there, tmp_path) == there
    assert check.like(here, tmp_path) == here
    assert report.on_other_machines(tmp_path / "amx") == ""


# ---- check


def test_check_compares_ratios_and_allows_the_spread() -> None:
    old = results_of(gelu_row([0.010] * 3, [0.040] * 3))
    slower_machine = results_of(gelu_row([0.030] * 3, [0.120] * 3))
    assert check.regressions(slower_machine, old) == []
    a_little = results_of(gelu_row([0.0115] * 3, [0.040] * 3))
    assert check.regressions(a_little, old) == []
    much = results_of(gelu_row([0.0120] * 3, [0.040] * 3))  # ratio 4 -> 3.33, 17 % less
    (line,) = check.regressions(much, old)
    assert "4.00 x -> 3.33 x, 17% less" in line
    noisy = results_of(gelu_row([0.0110, 0.0120, 0.0130], [0.040] * 3))
    assert check.regressions(noisy, old) == []


def test_check_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    old = results_of(gelu_row([0.010], [0.040]))
    other = copy.deepcopy(old)
    other["isa"] = "another"
    with pytest.raises(ValueError, match="isa was another"):
        check.regressions(old, other)
    with pytest.raises(ValueError, match="none of 0 rows"):
        check.regressions(results_of(), old)
    for name, results in (("old", old), ("new", results_of(gelu_row([0.020], [0.040])))):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    assert check.main(tmp_path / "old.json", tmp_path / "old.json") == 0
    assert check.main(tmp_path / "new.json", tmp_path / "old.json") == 1


# ---- all of it, at toy sizes


def python(*arguments: str, cwd: Path = ROOT) -> str:
    # pytest-benchmark measures nothing where a worker of pytest-xdist has left its mark
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path: Path) -> None:
    text = python("-m", "benchmarks", "--toy", "--output", str(tmp_path), "--deselect", "benchmarks/bench_memory.py")
    results = tables.load(tmp_path / "results.json")
    groups = {line["group"] for line in results["rows"]}
    for kind in (
        "attention forward",
        "attention decode",
        "GELU",
        "layer norm with residual",
        "small model",
        "generation",
    ):
        assert any(kind in group for group in groups), (kind, groups)
    assert {"matmul float32", "matmul bfloat16", "matmul int8", "copy", "read"} == results["limits"].keys()
    assert all(line["rounds"] == 2 and line["ratio"][0] > 0 for line in results["rows"])
    assert "goals met" in text
    assert "toy GELU" in text
    report.main(tmp_path)
    for name in ("attention.png", "roofline.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "README.md").read_text().count("\n| toy ") == len(results["rows"])


@pytest.mark.slow
def test_memory_of_a_step_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_memory

    monkeypatch.setenv("GPTCORE_BENCH", "toy")
    ballast = bytearray(b"x" * 2**29)  # this process holds 512 MB, none of which may be counted
    assert 1e5 < bench_memory.peak("ours", "float32") < len(ballast)
