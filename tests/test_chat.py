"""gptcore chat and generate with a chat template: through a pipe, in a terminal, and where the context is full."""

from __future__ import annotations

import functools
import io
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_command
from tiny import tiny_model

from gptcore import Tokenizer, Trainer, TrainingArguments
from gptcore.cli import chat, main
from gptcore.tasks.targets import Target
from gptcore.text.chat import TEMPLATES, Message, with_template

TALKS = [["Hello", "Hello there.", "Name?", "I am Ada 🙂."], ["Bye", "See you."]]


def messages(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt TALKS by heart, with chatml."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("Hello there. I am Ada. See you. user assistant " * 20, encoding="utf-8")
    template = TEMPLATES["chatml"]
    tokenizer = with_template(Tokenizer.train(folder / "text.txt", vocab_size=280), template)
    model = tiny_model(0.0, vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=1)
    examples = [
        Target("", tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(talk[:-1])), talk[-1])
        .example(tokenizer, template, 64)
        .inputs
        for talk in TALKS
    ]
    options: dict[str, Any] = {"max_steps": 80, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(str(folder / "run"), **options, save_steps=0, disable_tqdm=True)
    trainer = Trainer(model, arguments, examples, tokenizer=tokenizer)
    trainer.train()
    trainer.save_model(folder / "model")
    return folder / "model"


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *argv: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *map(str, argv), "--greedy", "--device", "cpu"])


def test_a_pipe_gets_a_reply_to_each_line(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    assert talk(monkeypatch, "Hello\n\n  Name?", folder, "--max-new-tokens", 20) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Hello there.\nI am Ada 🙂.\n", "")


def test_sampling_repeats_with_a_seed(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    said = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nHello\n"))
        assert main(["chat", str(folder), "--temperature", "50", "--top-k", "none", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert len(set(said[0].splitlines())) > 1


def test_the_oldest_messages_are_left_out_in_the_open(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    seen: list[list[Message]] = []
    stream = chat.stream

    def watched(model: Any, tokenizer: Any, template: Any, kept: list[Message], *rest: Any) -> Iterator[str]:
        seen.append(kept)
        return stream(model, tokenizer, template, kept, *rest)

    monkeypatch.setattr(chat, "stream", watched)
    assert talk(monkeypatch, "Hello\n" * 5, folder, "--max-new-tokens", 8, "--system", "Be kind.") == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) > 1
    assert set(err) == {"the model has 64 positions: the oldest 2 messages are left out"}
    tokenizer = Tokenizer.from_pretrained(folder)
    for kept in seen:
        assert kept[0] == {"role": "system", "content": "Be kind."}
        assert [m["role"] for m in kept[1:]] == ["user", "assistant"] * ((len(kept) - 2) // 2) + ["user"]
        assert len(TEMPLATES["chatml"].encode(tokenizer, kept, add_generation_prompt=True)) <= 64 - 8
    assert talk(monkeypatch, "Hello\n" + "x" * 99, folder) == 1
    assert "the last exchange takes 1" in capsys.readouterr().err


def test_ctrl_c_ends_a_reply_and_keeps_what_was_said(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    seen: list[list[Message]] = []

    def interrupted(model: Any, tokenizer: Any, template: Any, kept: list[Message], *rest: Any) -> Iterator[str]:
        seen.append(list(kept))
        yield "He"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    monkeypatch.setattr(chat, "lines", lambda terminal: iter(["Hello", "Name?"]))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert main(["chat", str(folder), "--max-new-tokens", "20"]) == 0
    assert seen[1] == messages("Hello", "He", "Name?")
    assert capsys.readouterr().out == "He\nHe\n"
    assert talk(monkeypatch, "Hello\n", folder) == 130  # in a pipe there is no next line to wait for


def use_terminal(name: str) -> None:
    """Read and write a terminal, which Ctrl-C reaches this process from."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (to the end of the process)


def until_it_waits(process: BaseProcess) -> None:
    """Wait until the first thread of a process has slept for a while."""
    asleep = 0
    while asleep < 20:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.002)


def test_a_terminal(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = ["chat", folder, "--greedy", "--max-new-tokens", "20"]
    process = start_command(command, tmp_path / "unused", functools.partial(use_terminal, os.ttyname(theirs)))
    timer = threading.Timer(120, process.kill)
    timer.start()
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 4096)  # an error after the end of the process
        shown = shown.partition(text)[2]

    until(b"Ctrl-D the conversation")
    os.close(theirs)  # from here on the process has it open
    until(b"> ")
    os.write(ours, b"Helo\x1b[Dl\n")  # the arrow edits the line
    until(b"Hello there.")
    until(b"> ")
    os.write(ours, b"Name?\n")
    until("I am Ada 🙂.".encode())
    until(b"> ")
    until_it_waits(process)  # a signal between the prompt and the wait for a key is seen with the next one
    for _ in range(10):
        os.write(ours, b"\x03")
        process.join(5)
        if process.exitcode is not None:
            break
    timer.cancel()
    assert process.exitcode == 130
    assert b"Traceback" not in shown
    os.close(ours)


def test_generate_replies_with_the_models_template(folder: Path, capsys: Any) -> None:
    command = ["generate", str(folder), "--greedy", "--max-new-tokens", "20", "--prompt", "Bye", "Hello"]
    assert main(command) == 0
    assert capsys.readouterr().out == "See you.\nHello there.\n"
    assert main([*command, "--chat-template", "none"]) == 0
    assert capsys.readouterr().out.startswith("Bye")


def test_a_model_without_a_template_says_so(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    tiny_model(vocab_size=tokenizer.vocab_size, n_positions=64).save_pretrained(tmp_path)
    assert talk(monkeypatch, "Hello\n", tmp_path) == 1
    assert "no chat template; say how messages become text with --chat-template chatml, alpaca, plain" in (
        capsys.readouterr().err
    )
    assert talk(monkeypatch, "Hello\n", tmp_path, "--chat-template", "plain", "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.count("\n") >= 1
