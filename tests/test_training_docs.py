"""docs/training.md and docs/from-apex.md: their commands and programs run as far as a CPU can."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from gptcore.cli import main, make_parser
from gptcore.cli.options import pick
from gptcore.training.arguments import TrainingArguments

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("training.md", "from-apex.md")}
SHELL = "".join(re.findall(r"```sh\n(.*?)```", PAGES["training.md"], re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line) for line in SHELL.splitlines()]


def options_of(command: list[str]) -> list[str]:
    """Return what follows gptcore."""
    return command[command.index("gptcore") + 1 :]


def test_the_page_has_each_kind_of_run() -> None:
    assert len([command for command in COMMANDS if options_of(command)[0] == "plan"]) == 4
    assert len([command for command in COMMANDS if command[0] == "torchrun"]) == 4


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_of_the_page(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(command)
    if options[0] == "plan":
        assert main(options) == 0
        assert "GB at the peak" in capsys.readouterr().out
        return
    args = TrainingArguments(**pick(make_parser().parse(options), TrainingArguments))
    if command[0] == "torchrun":  # its own options are known, and its processes can share the micro-batches
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(command[1:])
        processes = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[-1])
        assert args.gradient_accumulation_steps % processes == 0


def test_settings_of_the_page_are_arguments() -> None:
    table = PAGES["training.md"].partition("## Settings")[2]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert named - fields == {"cu_seqlens", "padding", "mfu"}


def test_the_program_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = re.findall(r"```python\n(.*?)```", PAGES["from-apex.md"], re.DOTALL)[1]
    exec(program, {"model": tiny_model(), "dataset": [torch.arange(8)] * 40})
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
