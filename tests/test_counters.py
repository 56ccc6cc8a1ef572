"""Memory traffic and instructions of the CUDA kernels, counted in the GPU simulator, against their minimum."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcore import cli, counters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts() -> dict[str, counters.Count]:
    return {count.case.name: count for count in counters.count()}


def test_attention_moves_what_its_tiles_must(counts: dict[str, counters.Count]) -> None:
    for name in ("attention forward", "attention backward", "attention, one query"):
        count = counts[name]
        assert count.case.once <= count.case.schedule
        assert count.bytes <= 1.02 * count.case.schedule, name
        assert count.distinct >= 0.99 * count.case.once, f"{name} leaves out a tensor"
        assert count.bank_conflicts == 0, name
        assert count.mma <= 1.10 * count.case.mma or not count.case.mma, name
        assert count.mma > 0


def test_rows_are_moved_once(counts: dict[str, counters.Count]) -> None:
    """Layer norm by all rows of a layer: each block of a full GPU reads the weight, over 2 % of 1024 rows by itself."""
    for name, most in (
        ("layer norm forward", 1.02),
        ("layer norm with residual forward", 1.02),
        ("layer norm backward", 1.05),
        ("layer norm with residual backward", 1.05),
        ("GELU forward", 1.02),
        ("GELU backward", 1.02),
    ):
        count = counts[name]
        assert count.distinct <= count.bytes <= most * count.case.schedule, name
        assert count.distinct >= 0.99 * count.case.schedule, f"{name} leaves out a tensor"
        assert count.bank_conflicts == 0, name
        assert count.mma == 0


def test_the_page_says_what_was_counted(counts: dict[str, counters.Count]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    assert counters.table(list(counts.values())) in page, "run python -m gptcore.counters docs/kernels.md"


def test_the_page_needs_a_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="has no <!-- counters -->"):
        counters.write(page, [])
    assert page.read_text() == "nothing\n"


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["bench"]) == 1
    assert "add --simt" in capsys.readouterr().err
    monkeypatch.setattr(counters, "count", lambda: iter(()))
    assert cli.main(["bench", "--simt"]) == 0
    assert "computed from data sheets, not measured" in capsys.readouterr().out
