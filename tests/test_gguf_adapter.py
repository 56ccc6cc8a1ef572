"""Adapters for llama.cpp. `make sweep` runs llama.cpp itself with them: tests/sweep/llama_cpp.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from test_lora import disturb
from tiny import tiny_model

from gptcore.cli import main
from gptcore.export import export_gguf_adapter
from gptcore.hf.gguf_weights import our_name
from gptcore.lora import add_adapter, merge_adapter, save_adapter


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "alpha": 12},
        {"target_modules": ["c_attn.q", "c_attn.v", "mlp.c_fc"]},
        {"target_modules": ["c_attn", "lm_head"], "rslora": True},
    ],
    ids=["all", "parts", "rslora"],
)
def test_weights_and_products_add_up_to_the_merged_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_model(tie_word_embeddings=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, r=3, **settings)
    disturb(model)
    export_gguf_adapter(model, tmp_path / "a.gguf")
    merge_adapter(model, keep_original=False)
    file = GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert (fields["general.type"], fields["general.architecture"], fields["adapter.type"]) == (
        "adapter",
        "gpt2",
        "lora",
    )
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {our_name(name.removesuffix(".lora_a")) for name in found if name.endswith(".lora_a")} == changed
    for name in found:
        if name.endswith(".lora_a"):
            A, B = found[name], found[name.removesuffix("a") + "b"]
            ours = our_name(name.removesuffix(".lora_a"))
            weight = before[ours] + fields["adapter.lora.alpha"] / len(A) * (B @ A)  # as llama.cpp
            torch.testing.assert_close(weight, model.state_dict()[ours])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"dora": True}, "DoRA in transformer.h.0.attn.c_attn, but llama.cpp's adapters are low-rank products alone"),
        ({"trainable_token_indices": [1]}, "trained weights or tokens in transformer.wte"),
        ({"modules_to_save": ["ln_f"]}, "trained weights or tokens in transformer.ln_f"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(tmp_path: Path, settings: Any, error: str) -> None:
    model = tiny_model()
    add_adapter(model, **settings)
    with pytest.raises(ValueError, match=error):
        export_gguf_adapter(model, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    model = tiny_model(vocab_size=257)
    model.save_pretrained(tmp_path / "base")
    assert main(["export", str(tmp_path / "base"), "--adapter", "none", "-o", "a.gguf", "--dtype", "f16"]) == 1
    assert "--dtype would have no effect, because an adapter is written as f32 GGUF" in capsys.readouterr().err
    add_adapter(model, "another", r=2)
    save_adapter(model, tmp_path / "adapter")
    export_gguf_adapter(model, tmp_path / "a.gguf", "another")
    command = ["export", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "-o", str(tmp_path / "b.gguf")]
    assert main(command) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(ValueError, match=r"there is no adapter 'default' to export; the model has \['another'\]"):
        export_gguf_adapter(model, tmp_path / "c.gguf")
