"""What the README shows runs as written."""

import re
from pathlib import Path

import torch
import transformers

from gptcore import Tokenizer, ops
from gptcore.data.corpus import write_standard_library_corpus

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_training_and_generation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    write_standard_library_corpus("train.txt")
    exec(BLOCKS[0], {})
    assert Path("out/checkpoint-100/model.safetensors").is_file()
    assert capsys.readouterr().out.rstrip().splitlines()[-1]


def test_operations():
    q, k, v = torch.randn(3, 2, 4, 16, 8).unbind()
    update, x, h = torch.randn(3, 2, 16, 32).unbind()
    qkv = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)
    names = {"q": q, "k": k, "v": v, "qkv": qkv, "update": update, "x": x, "h": h}
    names |= {"weight": torch.ones(32), "bias": torch.zeros(32), "projection": torch.randn(48, 32)}
    before = dict(names)
    exec(BLOCKS[1], names)
    torch.testing.assert_close(names["out"], ops.attention(q, k, v).transpose(1, 2))
    torch.testing.assert_close(names["x"], before["update"] + before["x"])
    assert names["h"].shape == before["h"].shape
    assert names["z"].shape == (2, 16, 48)


def test_from_gpt2_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    text = write_standard_library_corpus("whole.txt").read_text(encoding="utf-8")[:50_000]
    Path("train.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.train("train.txt", vocab_size=400)
    tokenizer.save_pretrained("gpt2")
    config = transformers.GPT2Config(
        vocab_size=400, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    names = {}
    exec(BLOCKS[2], names)
    theirs = transformers.GPT2LMHeadModel.from_pretrained("fine-tuned").eval()
    ids = torch.tensor([tokenizer.encode("Return the")])
    torch.testing.assert_close(theirs(ids).logits, names["model"].eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert Path("fine-tuned.gguf").read_bytes().startswith(b"GGUF")


def test_commands_exist():
    from gptcore.cli import make_parser

    for line in re.findall(r"^gptcore .*$", README, re.MULTILINE):
        words = line.split("#")[0].replace('"Once upon a time"', "text").split()
        make_parser().parse(words[1:])
