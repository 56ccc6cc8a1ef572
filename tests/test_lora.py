"""Adapters: against peft on transformers' models, merging, several on one base, training and resuming, errors."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import losses, same, tiny_model, tiny_trainer, weights
from torch import Tensor, nn

from gptcore import GPT
from gptcore.export import export_gguf
from gptcore.lora import (
    add_adapter,
    load_adapter,
    merge_adapter,
    report,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from gptcore.ops.quantized_linear import quantize
from gptcore.quantized import QuantizedLinear
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.trainer import Trainer

IDS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {"gpt2": {}, "gpt1": {"norm_position": "post", "layer_norm_epsilon": 1e-5}}
WHOLE: dict[str, dict[str, Any]] = {
    "c_attn": {"target_modules": ["c_attn"]},
    "rslora": {"target_modules": ["c_attn", "mlp.c_proj"], "rslora": True, "alpha": 3},
    "dora": {"target_modules": ["c_attn", "attn.c_proj", "c_fc"], "dora": True},
    "rows": {"target_modules": ["c_attn"], "trainable_token_indices": [3, 1, 31]},
    "copies": {"target_modules": ["c_attn"], "modules_to_save": ["ln_2", "c_fc"]},
}
OURS = WHOLE | {
    "q and v": {"target_modules": ["c_attn.q", "c_attn.v", "c_fc"], "rslora": True},
    "all-linear": {"target_modules": "all-linear", "dropout": 0.1},
}
PEFT = {"alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora", "dropout": "lora_dropout"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def disturb(model: Any) -> None:
    """Change every trained number, so that all of them matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def train(*models: Any) -> None:
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name.split(".")}


def pair(tmp_path: Path, kind: str = "gpt2", **changes: Any) -> tuple[GPT, Any]:
    """Return a model with random weights, and the same in transformers."""
    model = tiny_model(0.0, **KINDS[kind], **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "base")
    cls = {"gpt2": transformers.GPT2LMHeadModel, "gpt1": transformers.OpenAIGPTLMHeadModel}[kind]
    return model, cls.from_pretrained(tmp_path / "base").eval()


def with_peft(model: Any, settings: dict[str, Any]) -> Any:
    renamed = {PEFT.get(key, key): value for key, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by peft itself
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **renamed))


# ---- files -----------------------------------------------------------------------------------------------------------


def load(tmp_path: Path, *names: str) -> GPT:
    model = GPT.from_pretrained(tmp_path / "base")
    for name in names:
        load_adapter(model, tmp_path / name, name)
    return model


def keys(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OURS)
def test_merging_restores_every_bit(case: str, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    add_adapter(model, r=4, **OURS[case])
    disturb(model)
    before, apart = bits(model), logits(model)
    merge_adapter(model)
    assert not same(bits(model), before)
    close = 1e-6 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(logits(model), apart, rtol=close, atol=close)
    unmerge_adapter(model)
    assert same(bits(model), before)
    assert torch.equal(logits(model), apart)


def test_a_merged_model_is_a_plain_one(tmp_path: Path) -> None:
    model = tiny_model(0.0)
    model.ln_f.requires_grad_(False)
    add_adapter(model, r=4, target_modules="all-linear", modules_to_save=["wte"])
    disturb(model)
    for write in (model.save_pretrained, lambda path: export_gguf(model, None, path)):
        with pytest.raises(
            ValueError, match="computes with the adapter 'default': merge_adapter puts it into the weig"
        ):
            write(tmp_path / "model")
    merge_adapter(model)
    model.save_pretrained(tmp_path / "model")
    merged = logits(model)
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "model")), merged)
    unmerge_adapter(model)
    merge_adapter(model, keep_original=False)
    assert torch.equal(logits(model), merged)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    assert type(model.wte) is nn.Embedding
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"ln_f.weight", "ln_f.bias"}
    assert not any(module._forward_hooks for module in model.modules())
    add_adapter(model)


def test_several_adapters_on_one_base(tmp_path: Path) -> None:
    model, _ = pair(tmp_path)
    plain = logits(model)
    add_adapter(model, "first", r=2)
    disturb(model)
    first = logits(model)
    add_adapter(model, "second", r=4, target_modules=["c_fc"], modules_to_save=["ln_f"], trainable_token_indices=[1])
    assert torch.equal(logits(model), plain)
    disturb(model)
    second = logits(model)
    for name, expected in (("first", first), (None, plain), ("second", second)):
        set_adapter(model, name)
        assert torch.equal(logits(model), expected)
        trained = {parameter for parameter, p in model.named_parameters() if p.requires_grad}
        assert all(f".lora.{name}." in parameter for parameter in trained)
        assert bool(trained) == (name is not None)
    for name in ("first", "second"):
        save_adapter(model, tmp_path / name, name)
    both = load(tmp_path, "first", "second")
    assert torch.equal(logits(both), second)
    merge_adapter(both)
    unmerge_adapter(both)
    set_adapter(both, "first")
    assert torch.equal(logits(both), first)
    assert torch.equal(logits(copy.deepcopy(both)), first)
    set_adapter(both, None)
    assert torch.equal(logits(both), plain)
    both.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "plain")), plain)


@pytest.mark.parametrize("case", ["q and v", "rows", "copies"])
def test_generation_uses_the_adapter(case: str) -> None:
    model = tiny_model(0.0)
    plain = model.generate([[1, 2]], max_new_tokens=6, eos_token_id=-1)
    add_adapter(model, r=4, alpha=200, **OURS[case])
    disturb(model)
    found = model.generate([[1, 2]], max_new_tokens=6, eos_token_id=-1)
    assert torch.equal(found, model.generate([[1, 2]], max_new_tokens=6, eos_token_id=-1, use_cache=False))
    assert not torch.equal(found, plain)
    merge_adapter(model)
    assert torch.equal(found, model.generate([[1, 2]], max_new_tokens=6, eos_token_id=-1))
    unmerge_adapter(model)
    set_adapter(model, None)
    assert torch.equal(plain, model.generate([[1, 2]], max_new_tokens=6, eos_token_id=-1))


# ---- training --------------------------------------------------------------------------------------------------------


class PowerCut(TrainerCallback):
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.global_step == 3:
            raise RuntimeError("power cut")


def adapted(**changes: Any) -> GPT:
    model = tiny_model(0.1)
    settings = {"target_modules": ["c_attn.q", "c_fc"], "modules_to_save": ["ln_f"], "trainable_token_indices": [1]}
    add_adapter(model, r=4, dropout=0.2, **settings | changes)
    return model


def test_training_resumes_bit_exactly(tmp_path: Path) -> None:
    settings = {"bf16": True, "gradient_checkpointing": True}
    start = bits(adapted())
    whole = tiny_trainer(tmp_path / "whole", model=adapted(), **settings)
    whole.train()
    assert same(bits(whole.own_model), start)
    assert {parameter for parameter in whole.own_model.parameters() if parameter.requires_grad} == set(
        whole.optimizer.state
    )
    with pytest.raises(RuntimeError, match="power cut"):
        tiny_trainer(tmp_path / "parts", [PowerCut()], adapted(), save_steps=1, **settings).train()
    resumed = tiny_trainer(tmp_path / "parts", model=adapted(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.own_model), weights(whole.own_model))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    resumed.save_model(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    read = tiny_model()
    load_adapter(read, tmp_path / "adapter")
    assert torch.equal(logits(read), logits(whole.own_model))
    other = tiny_trainer(tmp_path / "parts", model=adapted(alpha=8), max_steps=8)
    with pytest.warns(UserWarning, match="the run takes another course than it would have: .*adapters"):
        other.train(resume_from_checkpoint=True)


def test_recomputed_blocks_draw_the_same_dropout(tmp_path: Path) -> None:
    trained = []
    for recompute in (False, True):
        trainer = tiny_trainer(tmp_path / str(recompute), model=adapted(), gradient_checkpointing=recompute)
        trainer.train()
        trained.append(weights(trainer.own_model))
    assert same(*trained)


def test_quantized_layers() -> None:
    model = tiny_model(0.0, n_embd=32)
    for block in model.h:
        made = QuantizedLinear(block.mlp.c_fc, "q8_0")
        made.weight = quantize(block.mlp.c_fc.weight.detach(), "q8_0")
        block.mlp.c_fc = made
    for settings in ({"target_modules": ["c_fc"], "dora": True}, {"modules_to_save": ["c_fc"]}):
        with pytest.raises(
            ValueError, match="a QuantizedLinear has no floating-point parameter `weight` to merge with"
        ):
            add_adapter(model, **settings)
    plain = logits(model)
    add_adapter(model, target_modules=["c_fc", "c_attn"])
    assert torch.equal(logits(model), plain)
    train(model)
    trained = logits(model)
    assert not torch.equal(trained, plain)
    before = bits(model)
    with pytest.raises(ValueError, match="a QuantizedLinear has no floating-point parameter"):
        merge_adapter(model)
    assert same(bits(model), before)
    assert torch.equal(logits(model), trained)


def test_report() -> None:
    model = tiny_model()
    found = add_adapter(model, r=8)
    trained = 2 * 8 * (16 + 48)
    assert found == report(model)
    assert found.after.trained == trained
    assert (found.after.gradients, found.after.moments) == (4 * trained, 8 * trained)
    assert found.before.weights == 4 * found.before.trained == 4 * tiny_model().num_parameters()
    assert found.after.weights == found.before.weights + 4 * trained
    merge_adapter(model)
    assert report(model).after.weights == found.after.weights + 2 * 4 * 16 * 48  # the originals of c_attn
    assert report(model).after.trained == 0
    text = str(found)
    assert f"trained parameters {found.before.trained:,} -> {trained:,} (14.16%)" in text
    assert "total" in text
    forward, weights = tiny_model().estimate_flops(8), 2 * 12 * 16 * 16 + 32 * 16
    assert model.estimate_flops(8) == forward
    assert model.estimate_flops(8, backward=True) == 3 * forward - 2 * weights * 8


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0, expected a rank"),
        ({"r": 2.0}, "r is 2.0, expected a rank"),
        ({"r": 100}, "r is 100, but transformer.h.0.attn.c_attn has 16 inputs and 48 outputs"),
        ({"alpha": 0}, "alpha is 0, expected a positive number"),
        ({"dropout": 1.0}, r"dropout is 1.0, expected a probability in \[0, 1\)"),
        ({"target_modules": "c_attn"}, "target_modules is 'c_attn', expected a list of names or 'all-linear'"),
        (
            {"target_modules": ["k_proj"]},
            "there are attn.c_attn, attn.c_attn.k, attn.c_attn.q, attn.c_attn.v, attn.c_p",
        ),
        ({"target_modules": []}, "the adapter changes no layer"),
        ({"target_modules": ["c_attn", "c_attn.q"]}, "has transformer.h.0.attn.c_attn, but .*c_attn.q is a part of it"),
        ({"target_modules": ["c_attn.q"], "dora": True}, "dora rescales all outputs of transformer.h.0.attn.c_attn"),
        ({"modules_to_save": ["head"]}, "modules_to_save has 'head', which no layer is named; there are .*ln_1"),
        ({"modules_to_save": ["c_attn"]}, "c_attn, but modules_to_save has it as well"),
        ({"trainable_token_indices": [32]}, "trainable_token_indices has 32, but transformer.wte has 32 rows"),
        ({"trainable_token_indices": [1, 1]}, "expected token ids, each once"),
        ({"modules_to_save": ["wte"], "trainable_token_indices": [1]}, "wte is in modules_to_save: leave out"),
        ({"name": "a.b"}, "an adapter cannot be named 'a.b'"),
        ({"name": "train"}, "an adapter cannot be named 'train'"),
    ],
)
def test_arguments_that_are_refused(settings: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        add_adapter(model, **settings)
    assert not hasattr(model, "adapters")
    assert "lora" not in "".join(model.state_dict())


def test_calls_in_the_wrong_order(tmp_path: Path) -> None:
    model = tiny_model()
    for call in (merge_adapter, unmerge_adapter, lambda m: set_adapter(m, "a"), lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match="the model has no adapter; add one"):
            call(model)
    add_adapter(model, "a")
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        add_adapter(model, "a")
    with pytest.raises(ValueError, match="there is no adapter 'b'; the model has 'a'"):
        set_adapter(model, "b")
    with pytest.raises(ValueError, match="there is no adapter 'b' to save"):
        save_adapter(model, tmp_path, "b")
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge_adapter(model)
    merge_adapter(model)
    for call in (merge_adapter, lambda m: set_adapter(m, "a"), lambda m: add_adapter(m, "b")):
        with pytest.raises(ValueError, match="the adapter 'a' is merged into the weights; call unmerge_adapter first"):
            call(model)
    unmerge_adapter(model)
    set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter is selected"):
        merge_adapter(model)
