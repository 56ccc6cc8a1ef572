"""The README: its programs run as written, its commands and links exist, its lists are complete."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from gptcore import _C, Tokenizer, ops

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCS = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))


def test_attention():
    names = {}
    exec(BLOCKS[0], names)
    q, k, v = (names[name].detach() for name in "qkv")
    torch.testing.assert_close(names["out"], ops.attention(q, k, v, causal=True, backend="torch"))


@pytest.mark.slow
def test_training_and_generation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    Path("train.txt").write_text(DOCS, encoding="utf-8")
    program = BLOCKS[1].replace("max_steps=100", "max_steps=3")
    assert program != BLOCKS[1]
    exec(program, {})
    assert Path("out/checkpoint-3/model.safetensors").is_file()
    assert capsys.readouterr().out.rstrip().splitlines()[-1]


@pytest.mark.slow
def test_from_gpt2_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    Path("train.txt").write_text(DOCS[:50_000], encoding="utf-8")
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

    commands = re.findall(r"^gptcore .*$", README, re.MULTILINE)
    for line in commands:
        words = line.split("#")[0].replace('"Once upon a time"', "text").split()
        make_parser().parse(words[1:])
    assert {line.split()[1] for line in commands} == set(make_parser().commands)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path or ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_every_instruction_set_and_architecture_is_named():
    architectures = re.search(r"GPTCORE_CUDA_SUPPORTED ([\d ]+)", (ROOT / "csrc/gpu/cuda.cmake").read_text())[1].split()
    for name in [*_C.compiled_isas(), *(f"sm_{number}" for number in architectures)]:
        assert re.search(rf"\b{name}\b", README), name


def test_the_two_commands_come_first_and_no_percentage_is_above_100():
    first_screen = "\n".join(README.splitlines()[:12])
    assert "make demo " in first_screen
    assert "make test " in first_screen
    assert all(float(number) <= 100 for number in re.findall(r"([\d.]+) ?%", README))
