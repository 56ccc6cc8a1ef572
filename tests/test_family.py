"""The family against transformers: the same logits, loss, gradients and greedy texts from random checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from gptcore.config import GELU_FORMS, GPTConfig
from gptcore.hf.pretrained import GPT1_NAMES, TRANSPOSED
from gptcore.model import GPT

# Weights ten times as large as at a real start, so that attention is far from uniform and every part matters
GPT2_SIZES: dict[str, dict] = {
    "small": {"vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "odd vocabulary": {"vocab_size": 1021, "n_positions": 80, "n_embd": 24, "n_layer": 3, "n_head": 3},
    "wide": {"vocab_size": 256, "n_positions": 80, "n_embd": 128, "n_layer": 1, "n_head": 2, "n_inner": 200},
    "untied": {
        "vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False,
    },
    "erf": {
        "vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2, "activation_function": "gelu",
    },
    "unscaled": {
        "vocab_size": 97, "n_positions": 80, "n_embd": 16, "n_layer": 2, "n_head": 2, "scale_attn_weights": False,
    },
    "inverse layer": {
        "vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 4, "n_head": 2,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "upcast": {  # both settings of the Mistral project's GPT-2
        "vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 3, "n_head": 2,
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
    },
    "epsilon": {
        "vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2, "layer_norm_epsilon": 1e-2,
    },
}  # fmt: skip
GPT1_SIZES: dict[str, dict] = {
    "gpt1": {"vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt1 odd": {"vocab_size": 1021, "n_positions": 80, "n_embd": 24, "n_layer": 3, "n_head": 3},
    "gpt1 untied": {
        "vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False,
    },
}  # fmt: skip
SIZES = [*GPT2_SIZES, *GPT1_SIZES]


def theirs(size: str, std: float = 0.2, **more: object) -> transformers.PreTrainedModel:
    """A random model of transformers, without dropout, in which no bias is 0 and no norm's weight is 1."""
    torch.manual_seed(0)
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **more}
    settings |= {"bos_token_id": None, "eos_token_id": None}
    if size in GPT1_SIZES:
        model: transformers.PreTrainedModel = transformers.OpenAIGPTLMHeadModel(
            transformers.OpenAIGPTConfig(**GPT1_SIZES[size], **settings)
        )
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SIZES[size], **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=std)
    return model.eval()


def both(size: str, folder: Path, **more: object) -> tuple[transformers.PreTrainedModel, GPT]:
    model = theirs(size, **more)
    model.save_pretrained(folder)
    return model, GPT.from_pretrained(folder)


def error(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def texts(lengths: list[int], vocab_size: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random texts (B, T) with padding on one side, the mask, and the positions that transformers has to be told."""
    T = max(lengths)
    ids, mask = torch.zeros(len(lengths), T, dtype=torch.int64), torch.zeros(len(lengths), T, dtype=torch.int64)
    for row, length in enumerate(lengths):
        here = slice(T - length, T) if side == "left" else slice(0, length)
        ids[row, here] = torch.randint(0, vocab_size, (length,))
        mask[row, here] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def gradients(model: nn.Module, ours: bool) -> dict[str, Tensor]:
    """By our names and in our orientation."""
    back = {their: our for our, their in GPT1_NAMES.items()}
    named = {}
    for name, parameter in model.named_parameters():
        name, grad = name.removeprefix("transformer."), parameter.grad
        assert grad is not None, name
        named[back.get(name, name)] = grad if ours or not TRANSPOSED.fullmatch(name) else grad.T
    return named


# ---- what is computed


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_every_gradient(size: str, side: str, tmp_path: Path) -> None:
    reference, model = both(size, tmp_path)
    lengths = [40, 40, 40] if side == "none" else [40, 17, 3]
    ids, mask, position_ids = texts(lengths, model.config.vocab_size, side)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # the first token of a text has nothing that foretells it; transformers asks its padding
        first = mask.argmax(1)
        theirs_labels = labels.scatter(1, first[:, None], torch.where(first > 0, -100, ids[:, 0])[:, None])
    else:
        theirs_labels = labels
    expected = reference(ids, attention_mask=mask, position_ids=position_ids, labels=theirs_labels)
    out = model(ids, mask, labels=labels)
    real = mask.bool()
    assert expected.logits[real].std() > 0.3
    assert error(out.logits[real], expected.logits[real]) < 1e-5
    assert error(out.loss, expected.loss) < 1e-5
    out.loss.backward()
    expected.loss.backward()
    got, wanted = gradients(model, ours=True), gradients(reference, ours=False)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert error(got[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize("size", SIZES)
def test_fifty_greedy_tokens(size: str, tmp_path: Path) -> None:
    """Each prompt by itself in transformers; in gptcore alone, and padded on the left to the longest, both ways."""
    reference, model = both(size, tmp_path)
    lengths = [11, 4, 1]
    ids, mask, _ = texts(lengths, model.config.vocab_size, "left")
    prompts = [row[-n:].tolist() for row, n in zip(ids, lengths, strict=True)]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(50):
                tokens = torch.cat([tokens, reference(tokens).logits[:, -1:].argmax(-1)], 1)
        expected.append(tokens[0, len(prompt) :])
        assert torch.equal(model.generate([prompt], 50)[0, len(prompt) :], expected[-1])
    for rows in (model.generate(prompts, 50), model.generate(ids, 50, attention_mask=mask)):
        assert torch.equal(rows[:, max(lengths) :], torch.stack(expected))
    if size in GPT2_SIZES:
        theirs = reference.generate(ids, attention_mask=mask, max_new_tokens=50, do_sample=False, pad_token_id=0)
        assert torch.equal(theirs[:, max(lengths) :], torch.stack(expected))


def test_position_ids_start_at_the_text_where_padding_is_on_the_left(tmp_path: Path) -> None:
    """transformers counts padding unless it is told not to; we never do."""
    reference, model = both("small", tmp_path)
    ids, mask, position_ids = texts([20, 6], 97, "left")
    alone = reference(ids[1:, -6:]).logits[0]
    assert error(model(ids, mask).logits[1, -6:], alone) < 1e-5
    assert error(reference(ids, attention_mask=mask, position_ids=position_ids).logits[1, -6:], alone) < 1e-5
    assert error(reference(ids, attention_mask=mask).logits[1, -6:], alone) > 0.1
    later = torch.arange(20)[None] + 3
    assert error(model(ids, position_ids=later).logits, reference(ids, position_ids=later).logits) < 1e-5


def test_attention_masks_are_respected(tmp_path: Path) -> None:
    reference, model = both("small", tmp_path)
    ids, mask, position_ids = texts([20, 6], 97, "left")
    other = ids.masked_scatter(mask == 0, torch.randint(0, 97, (14,)))
    assert not torch.equal(other, ids)
    assert torch.equal(model(other, mask).logits[mask.bool()], model(ids, mask).logits[mask.bool()])
    expected = reference(other, attention_mask=mask, position_ids=position_ids).logits
    assert error(model(other, mask).logits[mask.bool()], expected[mask.bool()]) < 1e-5


def test_erf_and_tanh_gelu_are_told_apart(tmp_path: Path) -> None:
    """GPT2Config says "gelu_new" for the tanh form and "gelu" for erf; OpenAIGPTConfig "gelu" for the tanh form."""
    ids = torch.randint(0, 97, (2, 30))
    for size, form in [("small", "tanh"), ("erf", "none"), ("gpt1", "tanh")]:
        reference, model = both(size, tmp_path / size)
        assert {block.mlp.gelu_form for block in model.h} == {form}
        expected = reference(ids).logits
        assert error(model(ids).logits, expected) < 5e-6
        for block in model.h:
            block.mlp.gelu_form = "none" if form == "tanh" else "tanh"
        assert error(model(ids).logits, expected) > 5e-5


@pytest.mark.parametrize("name", GELU_FORMS)
def test_every_name_of_gelu_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    reference, model = both("small", tmp_path, activation_function=name)
    ids = torch.randint(0, 97, (2, 30))
    assert error(model(ids).logits, reference(ids).logits) < 5e-6  # less than the two forms differ by


@pytest.mark.parametrize("size", ["unscaled", "inverse layer", "upcast"])
def test_scale_options_are_not_ignored(size: str, tmp_path: Path) -> None:
    """transformers' fused attention ignored them for years; its plain one is the measure here."""
    reference, model = both(size, tmp_path, attn_implementation="eager")
    ids = torch.randint(0, 97, (2, 30))
    assert error(model(ids).logits, reference(ids).logits) < 1e-5
    plain = GPT(
        dataclasses.replace(model.config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    ).eval()
    plain.load_state_dict(model.state_dict())
    assert error(plain(ids).logits, reference(ids).logits) > 1e-2


@pytest.mark.parametrize("size", ["small", "gpt1"])
def test_tied_weights_stay_tied(size: str, tmp_path: Path) -> None:
    """One tensor here and there, in the file once, and one after training and saving as well."""
    reference, model = both(size, tmp_path / "theirs")
    assert model.lm_head is None
    ids = torch.randint(0, 97, (2, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "ours")
    back = type(reference).from_pretrained(tmp_path / "ours")
    assert back.lm_head.weight is back.get_input_embeddings().weight
    assert torch.equal(back.lm_head.weight, model.wte.weight)
    assert error(back(ids).logits, model(ids).logits) < 1e-5


def test_a_padded_vocabulary(tmp_path: Path) -> None:
    """Embedding rows without a token: kept bit-exactly, and never generated if the number of tokens is given."""
    model = theirs("small", std=0.5)
    with torch.no_grad():
        model.transformer.wte.weight[90:] = 3 * model.transformer.wte.weight[:7]
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert torch.equal(ours.wte.weight, model.transformer.wte.weight)
    prompts = [[5], [6], [3]]
    assert (ours.generate(prompts, 50)[:, 1:] >= 90).any()
    for options in (
        {},
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "seed": 3, "top_k": 96},
        {"use_cache": False},
    ):
        assert (ours.generate(prompts, 50, vocab_size=90, **options) < 90).all()
    with pytest.raises(ValueError, match="vocab_size 98 should be between 1 and the model's 97 tokens"):
        ours.generate(prompts, 50, vocab_size=98)
    with pytest.raises(ValueError, match=r"weights of another shape: wte.weight \(97, 32\) instead of \(90, 32\)"):
        GPT.from_pretrained(tmp_path, vocab_size=90)


def test_n_ctx_of_an_old_config_file(tmp_path: Path) -> None:
    reference = theirs("small")
    reference.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"n_positions": 80', '"n_ctx": 80'))
    model = GPT.from_pretrained(tmp_path)
    assert model.config.n_ctx == model.config.n_positions == 80
    ids = torch.randint(0, 97, (1, 80))
    assert error(model(ids).logits, reference(ids).logits) < 1e-5


# ---- files, both ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["small", "odd vocabulary", "untied", "wide", "upcast", "gpt1", "gpt1 untied"])
def test_there_and_back_bit_for_bit(size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = theirs(size).to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "ours")
    back, info = type(reference).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert type(back) is type(reference)
    expected = reference.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    ours, original = back.config.to_dict(), reference.config.to_dict()
    for key in ("transformers_version", "_name_or_path"):
        ours.pop(key, None), original.pop(key, None)
    assert {key: ours[key] for key in original} == original


@pytest.mark.parametrize("size", ["small", "gpt1"])
def test_shards_of_transformers(size: str, tmp_path: Path) -> None:
    reference = theirs(size)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.randint(0, 97, (2, 30))
    assert error(GPT.from_pretrained(tmp_path)(ids).logits, reference(ids).logits) < 1e-5


@pytest.mark.parametrize("size", ["small", "gpt1"])
def test_a_pickle_as_old_versions_wrote_it(size: str, tmp_path: Path) -> None:
    """With the tied head under both names, and the causal masks and the positions among the weights."""
    reference = theirs(size)
    reference.config.save_pretrained(tmp_path)
    state = {**reference.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 80, 80).tril().bool()}
    assert "lm_head.weight" in state
    state["transformer.position_ids"] = torch.arange(80)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ids = torch.randint(0, 97, (2, 30))
    assert error(GPT.from_pretrained(tmp_path)(ids).logits, reference(ids).logits) < 1e-5


def test_the_model_without_a_head(tmp_path: Path) -> None:
    reference = theirs("small")
    reference.transformer.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 30))
    assert error(GPT.from_pretrained(tmp_path)(ids).logits, reference(ids).logits) < 1e-5


def test_another_head_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.GPT2Config(**GPT2_SIZES["small"], num_labels=3, bos_token_id=None, eos_token_id=None)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected weights: score.weight"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is saved as a model of gptcore's own")
def test_transformers_refuses_what_it_would_compute_otherwise(tmp_path: Path) -> None:
    GPT(GPTConfig(**GPT2_SIZES["small"], attention_window=4)).save_pretrained(tmp_path)
    with pytest.raises((ValueError, KeyError), match="gptcore"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", ["inverse layer", "gpt1 odd"])
def test_forward_hooks_see_the_hidden_states_of_transformers(size: str, tmp_path: Path) -> None:
    """The residual stream, attention outputs and MLP outputs, where the head of gptcore/model.py says they are."""
    model, ours = both(size, tmp_path)
    seen: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, output: int | None = None) -> None:
        module.register_forward_hook(
            lambda _module, _input, result: seen.__setitem__(name, result if output is None else result[output])
        )

    post = size in GPT1_SIZES
    record("stream 0", ours.drop)
    for layer, block in enumerate(ours.h):
        record(f"attention {layer}", block.attn)
        record(f"mlp {layer}", block.mlp)
        if post:
            record(f"stream {layer + 1}", block.ln_2, 0)
            record(f"middle {layer}", block.ln_1, 0)
        else:
            record(f"stream {layer}", block.ln_1, 1)
            record(f"middle {layer}", block.ln_2, 1)
    if not post:
        record(f"stream {len(ours.h)}", ours.ln_f, 0)
        record("last", ours.ln_f, 1)
    blocks = model.transformer.h
    expected: dict[str, Tensor] = {}
    for layer, block in enumerate(blocks):
        for name, module in (("attention", block.attn), ("mlp", block.mlp)):
            module.register_forward_hook(
                lambda _module, _input, result, key=f"{name} {layer}": expected.__setitem__(
                    key, result[0] if isinstance(result, (tuple, list)) else result
                )
            )
        after = block.ln_1 if post else block.ln_2
        take = (lambda _i, result: result) if post else (lambda given, _r: given[0])
        after.register_forward_hook(
            lambda _m, given, result, key=f"middle {layer}", take=take: expected.__setitem__(key, take(given, result))
        )
    ids = torch.randint(0, ours.config.vocab_size, (2, 13))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        ours(ids)
    expected |= {f"stream {layer}": state for layer, state in enumerate(states)}
    if not post:
        blocks_out = seen.pop("last")
        expected_last = seen["stream 0"] + sum(
            seen[f"{part} {layer}"] for layer in range(len(blocks)) for part in ("attention", "mlp")
        )
        torch.testing.assert_close(blocks_out, expected_last, rtol=1e-4, atol=1e-4)
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
