"""peft's files: ours opened by peft, peft's by ours, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_lora import IDS, OURS, WHOLE, bits, disturb, keys, load, logits, pair, train, with_peft
from tiny import tiny_model

from gptcore.heads import GPTForSequenceClassification
from gptcore.lora import add_adapter, load_adapter, merge_adapter, report, save_adapter


@pytest.mark.parametrize(("kind", "case"), [*(("gpt2", case) for case in OURS), ("gpt1", "rslora"), ("gpt1", "rows")])
def test_peft_opens_ours(kind: str, case: str, tmp_path: Path) -> None:
    model, theirs = pair(tmp_path, kind)
    plain = logits(model)
    add_adapter(model, r=4, **OURS[case])
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    opened.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "adapter")
    if case != "q and v":  # peft trains its blocks of zeros as well
        train(model, opened)  # in eval mode, without dropout
        torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)
        assert report(model).after.trained == opened.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("kind", "case"), [*(("gpt2", case) for case in WHOLE), ("gpt1", "dora"), ("gpt1", "copies")])
def test_ours_opens_peft(kind: str, case: str, tmp_path: Path) -> None:
    model, theirs = pair(tmp_path, kind)
    wrapped = with_peft(theirs, WHOLE[case])
    disturb(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-5)
    train(model, wrapped)
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "adapter")


def test_the_embedding_of_a_tied_model(tmp_path: Path) -> None:
    """peft has two copies of it, since it does not tie copies of `wte`: ours are equal, and read only if they are."""
    model, theirs = pair(tmp_path)
    add_adapter(model, r=2, modules_to_save=["wte"])
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)
    again = load(tmp_path, "adapter")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path, "adapter")), logits(model))

    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file({**tensors, "base_model.model.lm_head.weight": head + 1}, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the token embedding"):
        load(tmp_path, "adapter")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"base_model\.model\.lm_head\.weight is missing"):
        load(tmp_path, "adapter")


def test_an_untied_output_projection(tmp_path: Path) -> None:
    model, theirs = pair(tmp_path, tie_word_embeddings=False)
    wrapped = with_peft(theirs, {"target_modules": ["c_attn", "lm_head"]})
    disturb(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-5)
    train(model, wrapped)
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-5)
    merged = copy.deepcopy(model)
    merge_adapter(merged)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
    other = tiny_model(0.0, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight differs from that of the model"):
        load_adapter(other, tmp_path / "adapter")


def test_the_head_of_a_task(tmp_path: Path) -> None:
    config = {"num_labels": 3, "pad_token_id": 0, "vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1}
    theirs = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_head=2, bos_token_id=1, eos_token_id=1, **config)
    )
    theirs.eval().save_pretrained(tmp_path / "base")
    model = GPTForSequenceClassification.from_pretrained(tmp_path / "base")
    add_adapter(model, r=2)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert isinstance(opened, peft.PeftModelForSequenceClassification)
    ids = IDS.clamp(min=1)  # 0 is padding to transformers
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    opened.save_pretrained(tmp_path / "again")
    again = GPTForSequenceClassification.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_parts_of_c_attn_stay_parts(tmp_path: Path) -> None:
    model, _ = pair(tmp_path)
    add_adapter(model, r=2, target_modules=["c_attn.q", "h.1.attn.c_attn.v"], rslora=True)
    assert [len(block.attn.c_attn.lora["default"].A) for block in model.h] == [2, 4]
    plain = bits(model)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    read = load(tmp_path, "adapter")
    assert torch.equal(logits(read), logits(model))
    assert report(read) == report(model)
    merge_adapter(read)
    q, k, v = (plain["h.0.attn.c_attn.weight"] == read.h[0].attn.c_attn.weight).chunk(3)
    assert k.all()
    assert v.all()
    assert not q.any()
    edit(tmp_path, alpha_pattern={"transformer.h.0.attn.c_attn": 1})
    with pytest.raises(ValueError, match="rank_pattern or alpha_pattern was changed"):
        load(tmp_path, "adapter")


def edit(tmp_path: Path, **changes: Any) -> None:
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights of the base"),
        ({"layers_to_transform": [0]}, r"'layers_to_transform' is \[0\], an option that gptcore does not have"),
        ({"use_qalora": True}, "'use_qalora' is True, an option"),
        ({"of_next_year": {"a": 1}}, "'of_next_year' is"),
        ({"target_modules": ".*c_attn"}, "expected a list of names or 'all-linear'"),
        ({"target_modules": ["q_proj"]}, "'q_proj', which no layer is named; there are attn.c_attn, attn.c_attn.k"),
        ({"r": 3}, r"h\.0\.attn\.c_attn\.lora_A\.weight has shape \(4, 16\), but this model needs \(3, 16\)"),
        ({"r": 10**9}, "r is 1000000000, but transformer.h.0.attn.c_attn has 16 inputs and 48 outputs"),
        ({"r": "4"}, "'r' should be of type int, not '4'"),
        ({"use_dora": True}, r"h\.0\.attn\.c_attn\.lora_magnitude_vector is missing \(2 such tensors\)"),
        ({"target_modules": ["h.1.attn.c_attn"]}, r"h\.0\.attn\.c_attn\.lora_A\.weight is unexpected"),
        (
            {"trainable_token_indices": {"wpe": [1]}},
            "trainable_token_indices is .*wpe.*, expected rows of the token embedding",
        ),
    ],
)
def test_files_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_model()
    add_adapter(model, r=4)
    save_adapter(model, tmp_path / "adapter")
    edit(tmp_path, **changes)
    other = tiny_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path / "adapter")
    assert not hasattr(other, "adapters")
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_files_for_another_base_or_damaged(tmp_path: Path) -> None:
    model = tiny_model()
    add_adapter(model, r=4)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"lora_A\.weight has shape \(4, 16\), but this model needs \(4, 32\): the ada"
    ):
        load_adapter(tiny_model(n_embd=32), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"h\.2\.attn\.c_attn\.lora_A\.weight is missing"):
        load_adapter(tiny_model(n_layer=3), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor.fill_(torch.nan) for key, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="has numbers that are not finite"):
        load_adapter(tiny_model(), tmp_path / "adapter")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(
        FileNotFoundError, match=r"has no adapter_model\.safetensors, but adapter_config\.json, adapter_m"
    ):
        load_adapter(tiny_model(), tmp_path / "adapter")
    with torch.no_grad():
        model.h[0].attn.c_attn.lora["default"].A[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.lora_A\.weight has numbers that are not finite"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- merging and switching -------------------------------------------------------------------------------------------
