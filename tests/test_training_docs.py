"""docs/training.md and docs/from-apex.md: their commands and programs run as far as a CPU can."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import socket
import subprocess
import sys
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


SIZES = shlex.split(
    "--n-embd 16 --n-layer 1 --n-head 2 --n-positions 16 --tokenizer-kind char --max-steps 4 --samples 0 --threads 1 "
    "--warmup-steps 0 --eval-steps 2 --save-steps 4 --per-device-train-batch-size 2 --disable-tqdm --device cpu"
)


@pytest.mark.slow
def test_two_machines_give_the_bits_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers of torchrun on this machine, which find each other as on two; one process each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("train.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(300)))
    launch = next(command for command in COMMANDS if "--nnodes" in command)
    options, start = [*options_of(launch), *SIZES], launch.index("-m")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = f"localhost:{probe.getsockname()[1]}"
    changes = {"--nproc-per-node": "1", "--rdzv-endpoint": place}
    torchrun = [changes.get(before, word) for before, word in itertools.pairwise(launch[:start])]
    agents = [
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "gptcore", *options],
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    errors = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert main([*options, "--output-dir", "one"]) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert Path("out/checkpoint-4", name).read_bytes() == Path("one/checkpoint-4", name).read_bytes()


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
