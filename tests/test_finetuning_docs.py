"""docs/finetuning.md: its programs run as written, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from gptcore import GPT, GPTConfig, Tokenizer
from gptcore.hf.pretrained import _NoInitialization
from gptcore.lora import add_adapter

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    Path("train.txt").write_text("Return the number of lines. " * 200, encoding="utf-8")
    tokenizer = Tokenizer.train("train.txt", vocab_size=270)
    tokenizer.save_pretrained("gpt2")
    tiny_model(vocab_size=tokenizer.vocab_size, n_positions=32).save_pretrained("gpt2")
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(program, names)
    base = GPT.from_pretrained("gpt2").state_dict()
    assert all(torch.equal(names["base"].state_dict()[name], tensor) for name, tensor in base.items())
    assert not torch.equal(GPT.from_pretrained("merged").h[0].attn.c_attn.weight, base["h.0.attn.c_attn.weight"])
    assert (tmp_path / "copy/adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_the_numbers_of_the_page() -> None:
    with torch.device("meta"), _NoInitialization():
        found = add_adapter(GPT(GPTConfig()), r=8, alpha=16, target_modules=["c_attn"])
    assert str(found) in PAGE
