"""What the README shows runs as written."""

import re
from pathlib import Path

import torch

from gptcore.corpus import write_standard_library_corpus

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
    names = {"q": q, "k": k, "v": v, "update": update, "x": x, "h": h}
    names |= {"weight": torch.ones(32), "bias": torch.zeros(32)}
    before = dict(names)
    exec(BLOCKS[1], names)
    assert names["out"].shape == q.shape
    torch.testing.assert_close(names["x"], before["update"] + before["x"])
    assert names["h"].shape == before["h"].shape


def test_commands_exist():
    from gptcore.cli import make_parser

    for line in re.findall(r"^gptcore .*$", README, re.MULTILINE):
        words = line.split("#")[0].replace('"Once upon a time"', "text").split()
        make_parser().parse(words[1:])
