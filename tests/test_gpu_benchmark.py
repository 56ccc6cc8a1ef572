"""python -m benchmarks.gpu, as far as a machine without a GPU can tell."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, report
from benchmarks.on_gpu import processes, units


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    assert "no GPU here" in error


def test_rows_ratios_and_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same on the CPU, at tiny sizes and with a clock that counts calls."""

    def clock(call: gpu.Run, rounds: int = 1) -> float:
        call()
        clock.calls += 1  # type: ignore[attr-defined]
        return float(clock.calls)  # type: ignore[attr-defined]

    clock.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu, "milliseconds", clock)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "ATTENTION", {"tiny": (1, 2, 8, 16)})
    monkeypatch.setattr(gpu, "ROWS", {"tiny": (4, 8)})
    rows = [row for case in gpu.cases() for row in gpu.compare(case, ["cpu"], {"copy": 1e6, "matmul": 1e6})]

    assert {(row["op"], row["pass"]) for row in rows} == {
        (op, stage) for op in ("attention", "layer_norm", "gelu") for stage in ("forward", "backward")
    }
    for row in rows:
        assert (row["ms"] is None) == (row["failure"] is not None)
        assert gpu.text_of(row)
    ours = [row for row in rows if row["name"] == "gptcore cpu"]
    assert [row["failure"] for row in ours] == [None] * 6
    forward = next(row for row in rows if (row["op"], row["pass"], row["name"]) == ("gelu", "forward", "gptcore cpu"))
    theirs = next(row for row in rows if (row["op"], row["pass"], row["name"]) == ("gelu", "forward", "PyTorch"))
    assert forward["ratio"] == theirs["ms"] / forward["ms"]
    assert forward["percent"] == pytest.approx(100 * (2 * 4 * 32 * 2 / 1e6) / (forward["ms"] / 1e3))
    assert any(row["failure"] for row in rows if row["name"].startswith("SDPA"))  # cuDNN's, on a CPU

    results = {"rows": rows, "gpu": "none", "torch": "2", "date": "today", "rates": {"copy": 1e6, "matmul": 1e6}}
    gpu.draw(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
    assert report.on_a_gpu(tmp_path) == ""
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    table = report.on_a_gpu(tmp_path)
    assert f"| gelu | tiny (4, 32) | forward | {forward['percent']:.0f} % of copy | {forward['ms']:.3f} ms |" in table
    assert table.count("\n| ") == 2 + 6


def test_a_step_that_fails_is_named() -> None:
    assert gpu.run("a step", ["false"], 10) == "a step: exit code 1"
    assert gpu.run("a step", ["true"], 10) is None
    assert "no-such-program" in str(gpu.run("a step", ["no-such-program"], 10))
    assert "timed out" in str(gpu.run("a step", ["sleep", "5"], 0.1))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVICE", "ATTENTION", "ROWS"):
        monkeypatch.setattr(gpu, name, getattr(gpu, name))  # so that it is what it was afterwards
    gpu.use_tiny_sizes()


def rows_of(part: str, output: Path) -> Any:
    assert gpu.run_part(part, output, dry=True) == 0
    rows = json.loads((output / f"part_{part.replace(' ', '_')}.json").read_text())["rows"]
    assert [row.get("failure") for row in rows if str(row.get("name")).startswith("gptcore")].count(None) == len(
        [row for row in rows if str(row.get("name")).startswith("gptcore")]
    )
    return rows


@pytest.mark.parametrize("part", ["machine", "rates", "kernels", "layer norm", "epilogues"])
def test_a_part_runs_without_a_gpu(tiny: None, tmp_path: Path, part: str) -> None:
    assert rows_of(part, tmp_path)


@pytest.mark.slow
def test_steps_and_generation_run_without_a_gpu(tiny: None, tmp_path: Path) -> None:
    rows = rows_of("step", tmp_path)
    assert len(rows) == 7
    assert not [row["failure"] for row in rows if "failure" in row]
    assert all(row["ms"] > 0 and row["launches"] == 0 for row in rows)
    assert len(rows_of("graphs", tmp_path)) == 5
    assert {row["name"] for row in rows_of("generation", tmp_path)} >= {"gptcore", "transformers"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_kernels_of_units_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "CUBIN", tmp_path / "units.cubin")
    code = units.compiled()
    assert all(name.encode() in code for name in units.KERNELS)
    (tmp_path / "units.cubin").write_bytes(b"of before")
    assert units.compiled() == b"of before"


def child_that_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of Python: one row, and then nothing for a long time unless it is the part `machine`."""
    script = tmp_path / "child"
    script.write_text(
        '#!/bin/sh\nname=$(echo "$6" | tr " " _)\necho \'{"rows": [{"name": "a row"}]}\' > "$4/part_$name.json"\n'
        '[ "$6" = machine ] || sleep 60\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(script))


def test_a_part_that_takes_too_long_is_killed_and_the_next_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child_that_writes(monkeypatch, tmp_path)
    monkeypatch.setitem(gpu.PARTS, "rates", gpu.Part(1, gpu.measured_rates))
    names = ["machine", "rates", "golden"]
    assert gpu.measure(tmp_path, names, 4, [], dry=True, skip_tests=True) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [found["parts"][name]["rows"] for name in names] == [[{"name": "a row"}]] * 3
    assert found["parts"]["machine"]["failure"] is None
    assert found["failures"][0] == "rates: killed after 1 s"
    assert found["failures"][1].startswith("golden: killed after")


def test_a_signal_leaves_whole_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child_that_writes(monkeypatch, tmp_path)

    def kill_later() -> None:
        while not (tmp_path / "part_rates.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_later).start()
    before = signal.getsignal(signal.SIGTERM)
    assert gpu.measure(tmp_path, ["machine", "rates", "golden"], 100, [], dry=True, skip_tests=True) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["parts"]) == ["machine", "rates"]
    assert found["failures"] == ["rates: stopped"]
    assert gpu.measure(tmp_path, ["machine"], 0, [], dry=True, skip_tests=True) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["failures"] == ["machine: no time is left"]
