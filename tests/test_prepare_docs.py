"""docs/data.md: its commands and its program run as written, its table of steps is that of the recipes."""

import json
import re
from pathlib import Path

import made_texts
import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from gptcore.cli import main
from gptcore.prepare.pipeline import prepare
from gptcore.prepare.recipe import FIRST, RECIPES, SECOND, make_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
SMALL_MODEL = ["--n-positions", "16", "--n-embd", "16", "--n-layer", "1", "--n-head", "2", "--max-steps", "2",
               "--warmup-steps", "0", "--samples", "0", "--disable-tqdm", "--device", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_commands_and_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made_texts.write_jsonl(Path("pages.jsonl"), [made_texts.text(seed) for seed in range(40)])
    Path("books").mkdir()
    for seed in range(5):
        Path(f"books/{seed}.txt").write_text(made_texts.text(100 + seed, lines=60), encoding="utf-8")
    Path("exam.txt").write_text(made_texts.text(3, lines=1), encoding="utf-8")
    (config,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    Path("prepare.toml").write_text(config, encoding="utf-8")
    commands = re.findall(r"^gptcore .*$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    rows = [f'"{made_texts.text(seed, lines=1)}",{("clean", "toxic")[seed % 2]}' for seed in range(20)]
    Path("labelled.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    for command in commands:
        words = [str(path) for word in command.split()[1:] for path in _expanded(word)]
        extra = {"train": SMALL_MODEL, "finetune": SMALL_MODEL[8:10] + SMALL_MODEL[-3:]}.get(
            words[0], ["--workers", "1"]
        )
        assert main([*words, *extra]) == 0, (command, capsys.readouterr().err)
    shown = capsys.readouterr().out
    assert "source books: " in shown
    assert "decontaminate        dropped 1 of " in shown
    assert Path("mixed/report.html").is_file()


def _expanded(word: str) -> list[str]:
    """Return what a shell makes of a word: the files of a glob, unless a name stands before it."""
    return sorted(map(str, Path().glob(word))) if "*" in word and "=" not in word else [word]


@pytest.mark.slow
def test_steps_in_two_processes_of_datatrove(tmp_path, monkeypatch):
    """They keep the texts that gptcore prepare keeps, changed in the same way."""
    monkeypatch.chdir(tmp_path)
    Path("pages").mkdir()
    mail = "Write to someone@example.org about the Work and the License."
    for name, first in (("a", 0), ("b", 10)):
        texts = [f"{made_texts.text(seed)}\n\n{mail} \r\n" for seed in range(first, first + 3)]
        parquet.write_table(pyarrow.table({"text": [*texts, "too short"]}), f"pages/{name}.parquet")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(program, {"__name__": "program"})
    kept = [parquet.read_table(path)["text"].to_pylist() for path in sorted(Path("kept").iterdir())]
    assert list(map(len, kept)) == [3, 3]
    changes = {"split": {"validation": 0.0, "test": 0.0}, "shards": {"vocab_size": 300}}
    prepare(["pages"], "out", make_recipe("web", changes), log=lambda line: None)
    lines = zstandard.ZstdDecompressor().stream_reader(Path("out/text/train-00000.jsonl.zst").read_bytes()).read()
    assert {text for part in kept for text in part} == {json.loads(line)["text"] for line in lines.splitlines()}
    assert all("<EMAIL>" in text and "\r" not in text for part in kept for text in part)


@pytest.mark.slow
def test_prepared_against_raw(tmp_path, monkeypatch, capsys):
    """The experiment of the page runs, with two steps of training."""
    from benchmarks import prepared_against_raw

    assert "python -m benchmarks.prepared_against_raw out " in PAGE
    for seed in range(60):
        (tmp_path / f"in/package-{seed}").mkdir(parents=True)
        (tmp_path / f"in/package-{seed}/README.md").write_text(made_texts.text(seed, lines=30), encoding="utf-8")
    monkeypatch.setattr(prepared_against_raw, "STEPS", 2)
    monkeypatch.setattr(prepared_against_raw, "WARMUP", 0)
    monkeypatch.setattr(prepared_against_raw, "BLOCK", 32)
    prepared_against_raw.main(tmp_path / "out", [tmp_path / "in"])
    printed = capsys.readouterr().out
    assert re.search(
        r"\d+ held-out tokens; 1,024 tokens of training\nraw  .* loss \d+\.\d+, \d+\.\d+\nprepared ", printed
    )


def test_the_table_of_steps_is_that_of_the_recipes():
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (?=[^|]*\|[^|]*\|[^|]*\|[^|]*\|$)(.*) \|$", PAGE, re.MULTILINE))
    for step in [*FIRST, *SECOND]:
        cells = [cell.strip() for cell in rows[step].split("|")]
        for recipe, cell in zip(RECIPES, cells, strict=True):
            assert bool(cell) == (step in make_recipe(recipe).sections), (step, recipe)
