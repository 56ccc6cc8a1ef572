"""docs/finetuning.md: its commands and programs run as written, one after the other."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from gptcore import GPT, GPTConfig, Tokenizer, cli
from gptcore.hf.pretrained import NoInitialization
from gptcore.lora import add_adapter
from gptcore.tasks import FinetuneOptions

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")


def write_examples() -> None:
    """Write the files that the page names."""
    reviews = "text,label\n" + 'A fine film.,positive\n"Dull, and far too long.",negative\n' * 20
    two = "text,text_pair,label\n" + "Bob ran.,Bob was running.,same\nBob ran.,Bob sat.,other\n" * 20
    tags = "Alice B-PER\nlives O\nin O\nNew B-LOC\nYork I-LOC\n\n" * 20
    question = {"question": "Who ran?", "answers": [{"text": "Alice", "answer_start": 0}]}
    nothing = {"question": "Who ate?", "answers": []}
    paragraph = {"context": "Alice ran. Bob did not.", "qas": [question, nothing]}
    story = {"context": "Alice was hungry.", "choices": ["She ate.", "She ran."], "label": 0}
    pairs = [{"prompt": "the cat =", "completion": " le chat"}, {"prompt": "a dog =", "completion": " un chien"}]
    talk = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi!"}]
    for name, text in (
        ("pairs.csv", two), ("reviews.csv", reviews), ("unseen.csv", reviews), ("tweets.conll", tags),
        ("more.conll", tags),
        ("squad.json", json.dumps({"data": [{"paragraphs": [paragraph] * 20}]})),
        ("pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs * 8)),
        ("talks.jsonl", (json.dumps({"messages": talk}) + "\n") * 16),
        ("stories.jsonl", (json.dumps(story) + "\n") * 20),
    ):  # fmt: skip
        Path(name).write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    Path("train.txt").write_text("Return the number of lines. " * 200, encoding="utf-8")
    tokenizer = Tokenizer.train("train.txt", vocab_size=270)
    tokenizer.save_pretrained("gpt2")
    tiny_model(vocab_size=tokenizer.vocab_size, n_positions=64).save_pretrained("gpt2")
    write_examples()
    names: dict[str, Any] = {}
    for kind, block in re.findall(r"```(python|)\n(.*?)```", PAGE, re.DOTALL):
        if kind == "python":
            exec(block, names)
        for command in re.findall(r"(?m)^gptcore (.*)", block) if not kind else ():
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))  # for gptcore chat
            short = ["--num-train-epochs", "1"] if command.startswith("finetune") else []
            assert cli.main([*shlex.split(command), *short]) == 0, f"{command}\n{capsys.readouterr().err}"
    base = GPT.from_pretrained("gpt2").state_dict()
    assert all(torch.equal(names["base"].state_dict()[name], tensor) for name, tensor in base.items())
    assert not torch.equal(GPT.from_pretrained("merged").h[0].attn.c_attn.weight, base["h.0.attn.c_attn.weight"])
    assert (tmp_path / "copy/adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_the_default_labelling_is_what_scored_better() -> None:
    measured = re.findall(r"\| `(last|twice)` \| (0\.\d+) \| (0\.\d+) \|", PAGE)
    scores = {name: sum(map(float, seeds)) for name, *seeds in measured}
    assert scores.keys() == {"last", "twice"}
    assert FinetuneOptions("entities", "tweets.conll").labelling == max(scores, key=scores.__getitem__)


def test_the_numbers_of_the_page() -> None:
    with torch.device("meta"), NoInitialization():
        found = add_adapter(GPT(GPTConfig()), r=8, alpha=16, target_modules=["c_attn"])
    assert str(found) in PAGE
