"""Checkpoints that TensorFlow writes as OpenAI's program did, read back: pytest tests/sweep/tensorflow_checkpoint.py

Needs the extra tf, which is too large for every run; so pytest does not collect this file by default.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import GPT, GPTConfig

with contextlib.suppress(ImportError):
    import triton  # noqa: F401  # both hold an LLVM, and Triton's aborts where TensorFlow's has been loaded before
import tensorflow as tf

SMALL = GPTConfig(vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=4)
IDS = torch.arange(20).view(2, 10)


def write(model: GPT, folder: Path, name: str) -> None:
    variables: dict[str, np.ndarray] = {}
    for ours, tensor in model.state_dict().items():
        path = ours.replace("h.", "h", 1).split(".")
        if path[0] in ("wte", "wpe"):
            variables[f"model/{path[0]}"] = tensor.numpy()
        elif path[-1] == "bias":
            variables["/".join(["model", *path[:-1], "b"])] = tensor.numpy()
        elif tensor.ndim == 1:
            variables["/".join(["model", *path[:-1], "g"])] = tensor.numpy()
        else:  # a convolution of width 1, from (in) to (out)
            variables["/".join(["model", *path[:-1], "w"])] = tensor.t()[None].numpy()
    folder.mkdir(exist_ok=True)
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        for variable, value in variables.items():
            made = tf.compat.v1.get_variable(variable, value.shape, initializer=tf.compat.v1.zeros_initializer())
            made.load(np.ascontiguousarray(value), session)
        tf.compat.v1.train.Saver().save(session, str(folder / name))
    config = model.config
    hparams = {"n_vocab": config.vocab_size, "n_ctx": config.n_positions, "n_embd": config.n_embd}
    hparams |= {"n_head": config.n_head, "n_layer": config.n_layer}
    (folder / "hparams.json").write_text(json.dumps(hparams))


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt-1000"])
def test_a_checkpoint_of_tensorflow(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    write(model, tmp_path, name)
    assert (tmp_path / "checkpoint").is_file()
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    for ours, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[ours], tensor), ours
    with torch.no_grad():
        for parameter in back.parameters():  # memory of their own, that can be written
            parameter.add_(1.0)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


MEMORY = """
import sys, torch
from gptcore import GPT
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
GPT.from_pretrained(sys.argv[1])  # a small one: what every load costs once, TensorFlow itself above all
before = peak()
model = GPT.from_pretrained(sys.argv[2])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    write(GPT(SMALL), tmp_path / "small", "model.ckpt")
    big = GPTConfig(vocab_size=20000, n_positions=64, n_embd=768, n_layer=4, n_head=12)  # 175 MB
    write(GPT(big), tmp_path / "big", "model.ckpt")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert 0.8 < float(done.stdout) < 1.2
