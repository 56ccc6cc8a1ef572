"""python -m benchmarks.gpu, as far as a machine without a GPU can tell."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, report


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
