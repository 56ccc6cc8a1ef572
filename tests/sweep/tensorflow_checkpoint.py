"""A checkpoint that TensorFlow writes as OpenAI's program did, read back: pytest tests/sweep/tensorflow_checkpoint.py

Needs the extra tf, which is too large for every run; so the name of this file is none that pytest collects by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import torch

from gptcore import GPT, GPTConfig


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt-1000"])
def test_a_checkpoint_of_tensorflow(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=4)).eval()
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
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        for variable, value in variables.items():
            tf.compat.v1.get_variable(variable, initializer=tf.constant(np.ascontiguousarray(value)))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / name))
    hparams = {"n_vocab": 97, "n_ctx": 32, "n_embd": 48, "n_head": 4, "n_layer": 2}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    assert (tmp_path / "checkpoint").is_file()
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    for ours, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[ours], tensor), ours
