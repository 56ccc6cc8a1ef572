"""GPTConfig: defaults, what it refuses and in which words, and config.json."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore import GPT
from gptcore.config import GELU_FORMS, PRESETS, GPTConfig

# config.json of the published GPT-2, as transformers' oldest versions wrote it
PUBLISHED_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip


def test_the_defaults_are_those_of_gpt2() -> None:
    assert GPTConfig.from_dict(PUBLISHED_GPT2) == GPTConfig()
    assert GPTConfig().head_dim == 64


def test_every_field_says_what_it_is_in_one_line() -> None:
    for field in dataclasses.fields(GPTConfig):
        assert 0 < len(field.metadata["help"]) < 100
        assert "\n" not in field.metadata["help"]


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"n_embd": 100, "n_head": 3}, ValueError, "n_embd 100 is not a multiple of n_head 3"),
        ({"n_embd": 1024, "n_head": 2}, ValueError, "512 dimensions a head, but the attention kernels do 256"),
        ({"n_layer": 0}, ValueError, "n_layer should be at least 1, not 0"),
        ({"n_layer": 2.0}, TypeError, "n_layer should be a whole number, not 2.0"),
        ({"n_layer": True}, TypeError, "n_layer should be a whole number, not True"),
        ({"n_inner": -1}, ValueError, "n_inner should be at least 1, not -1"),
        ({"vocab_size": "65"}, TypeError, "vocab_size should be a whole number, not '65'"),
        ({"attn_pdrop": 1.0}, ValueError, r"attn_pdrop is a probability in \[0, 1\), not 1.0"),
        ({"resid_pdrop": -0.1}, ValueError, r"resid_pdrop is a probability in \[0, 1\), not -0.1"),
        ({"embd_pdrop": float("nan")}, ValueError, r"embd_pdrop is a probability in \[0, 1\), not nan"),
        ({"embd_pdrop": None}, TypeError, "embd_pdrop should be a number, not None"),
        ({"layer_norm_epsilon": 0}, ValueError, "layer_norm_epsilon should be positive and finite, not 0"),
        ({"initializer_range": float("inf")}, ValueError, "initializer_range should be positive and finite, not inf"),
        ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings should be True or False, not 1"),
        ({"activation_function": "relu"}, ValueError, "'relu' is not supported; .* gelu_new, gelu_pytorch_tanh, "),
        ({"norm_position": "mid"}, ValueError, "'mid' is not supported; it should be one of pre, post"),
        ({"position_embedding": "rope"}, ValueError, "'rope' is not supported; .* learned, sinusoidal"),
        ({"position_embedding": "sinusoidal", "n_embd": 3, "n_head": 3}, ValueError, "n_embd is odd: 3"),
        ({"attention_window": 0}, ValueError, "attention_window should be at least 1, not 0"),
        ({"pad_token_id": 50257}, ValueError, "pad_token_id 50257 is outside the vocabulary of 50257 tokens"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id should be at least 0, not -1"),
        ({"vocab_size": 65, "eos_token_id": 65}, ValueError, "eos_token_id 65 is outside the vocabulary of 65 tokens"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(setting: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GPTConfig(**setting)


def test_the_end_of_text_id_of_gpt2_does_not_follow_into_a_smaller_vocabulary() -> None:
    config = GPTConfig(vocab_size=65)
    assert config.eos_token_id is None
    assert config.bos_token_id is None
    assert GPTConfig(eos_token_id=None).eos_token_id is None
    assert GPTConfig(vocab_size=65, eos_token_id=64).eos_token_id == 64


def test_it_cannot_be_changed_behind_the_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 0  # type: ignore[misc]
    with pytest.raises(ValueError, match="n_layer"):
        dataclasses.replace(GPTConfig(), n_layer=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"n_layers": 6}, "unknown key 'n_layers'; the nearest known one is 'n_layer'"),
        ({"dropout": 0.1}, "unknown key 'dropout'; the nearest known one is"),
        ({"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ({"model_type": "llama"}, "model_type 'llama' is not a GPT"),
        ({"n_ctx": 512}, "n_ctx 512 and n_positions 1024 should be equal"),
    ],
)
def test_a_config_file_of_something_else_is_refused(extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict({**PUBLISHED_GPT2, **extra})


def test_settings_of_generation_in_old_config_files_do_not_matter() -> None:
    """Versions of transformers before 5 kept them there, and wrote all of them where one was not the default."""
    old = {
        "_attn_implementation_autoset": True, "bad_words_ids": None, "begin_suppress_tokens": None, "typical_p": 1.0,
        "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
        "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
        "forced_bos_token_id": None, "forced_eos_token_id": None, "num_beam_groups": 1, "output_scores": False,
        "remove_invalid_values": False, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
        "tf_legacy_loss": False, "tie_encoder_decoder": False, "xla_device": None,
    }  # fmt: skip
    assert GPTConfig.from_dict({**PUBLISHED_GPT2, **old}) == GPTConfig.from_dict(PUBLISHED_GPT2)


def test_a_config_calls_itself_what_transformers_would_compute() -> None:
    for setting, kind, architecture in [
        ({}, "gpt2", ["GPT2LMHeadModel"]),
        ({"activation_function": "gelu", "scale_attn_weights": False, "n_inner": 5}, "gpt2", ["GPT2LMHeadModel"]),
        ({"norm_position": "post"}, "openai-gpt", ["OpenAIGPTLMHeadModel"]),
        ({"norm_position": "post", "n_inner": 3072}, "openai-gpt", ["OpenAIGPTLMHeadModel"]),
        ({"norm_position": "post", "n_inner": 3000}, "gptcore", None),
        ({"norm_position": "post", "activation_function": "gelu"}, "gptcore", None),
        ({"norm_position": "post", "scale_attn_weights": False}, "gptcore", None),
        ({"norm_position": "post", "scale_attn_by_inverse_layer_idx": True}, "gptcore", None),
        ({"norm_position": "post", "position_embedding": "sinusoidal"}, "gptcore", None),
        ({"position_embedding": "sinusoidal"}, "gptcore", None),
        ({"attention_window": 8}, "gptcore", None),
    ]:
        values = GPTConfig(**setting).to_dict()
        assert (values["model_type"], values.get("architectures")) == (kind, architecture), setting


def test_gpt1_config_files_say_gelu_and_mean_its_tanh_form() -> None:
    published = {
        "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0, "predict_special_tokens": True,
        "resid_pdrop": 0.1, "vocab_size": 40478,
    }  # fmt: skip
    assert GPTConfig.from_dict(published) == GPTConfig.preset("gpt")
    assert GPTConfig.from_dict({"model_type": "openai-gpt"}) == GPTConfig.preset("gpt")
    assert GPTConfig.preset("gpt").activation_function == "gelu_new"
    with pytest.raises(ValueError, match="afn 'relu' is not supported; it should be 'gelu'"):
        GPTConfig.from_dict({**published, "afn": "relu"})


def test_n_ctx_is_the_old_name_of_n_positions() -> None:
    assert GPTConfig(n_positions=77).n_ctx == 77
    assert GPTConfig.from_dict({"model_type": "gpt2", "n_ctx": 77}).n_positions == 77
    assert GPTConfig.from_dict({"n_positions": 77, "n_ctx": 77}).n_ctx == 77
    with pytest.raises(ValueError, match="n_ctx 77 and n_positions 78 should be equal"):
        GPTConfig.from_dict({"n_positions": 78, "n_ctx": 77})


def test_presets() -> None:
    assert GPTConfig.preset("gpt2") == GPTConfig()
    assert GPTConfig.preset("gpt2-xl").head_dim == 64
    assert GPTConfig.preset("gpt3-13b").head_dim == 128
    assert GPTConfig.preset("gpt3-1.3b").head_dim == 128
    assert GPTConfig.preset("gpt3-125m").attention_window == 256
    assert GPTConfig.preset("gpt2", n_positions=64, attn_pdrop=0.0) == GPTConfig(n_positions=64, attn_pdrop=0.0)
    for name in PRESETS:
        assert GPTConfig.preset(name).head_dim in (16, 32, 64, 80, 96, 128)


@pytest.mark.parametrize(("name", "near"), [("gpt2-meduim", "gpt2-medium"), ("gpt3", "gpt"), ("GPT3-13B", "gpt3-13b")])
def test_an_unknown_preset_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"there is no preset '{name}'; the nearest of the .* is '{near}"):
        GPTConfig.preset(name)


@given(
    n_head=st.integers(1, 16),
    head_dim=st.integers(1, 128).map(lambda n: 2 * n),
    vocab_size=st.integers(1, 60000),
    dropout=st.floats(0, 1, exclude_max=True),
    epsilon=st.floats(1e-12, 1e-3),
    tied=st.booleans(),
    activation=st.sampled_from(list(GELU_FORMS)),
    norm=st.sampled_from(["pre", "post"]),
    positions=st.sampled_from(["learned", "sinusoidal"]),
    window=st.none() | st.integers(1, 4096),
    data=st.data(),
)
def test_config_json_round_trips(
    n_head: int, head_dim: int, vocab_size: int, dropout: float, epsilon: float, tied: bool, activation: str, norm: str,
    positions: str, window: int | None, data: st.DataObject,
) -> None:  # fmt: skip
    config = GPTConfig(
        vocab_size=vocab_size, n_embd=n_head * head_dim, n_head=n_head, attn_pdrop=dropout, layer_norm_epsilon=epsilon,
        tie_word_embeddings=tied, activation_function=activation, norm_position=norm, position_embedding=positions,
        attention_window=window, pad_token_id=data.draw(st.none() | st.integers(0, vocab_size - 1)),
    )  # fmt: skip
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": False},
        {"norm_position": "post"},
        {"position_embedding": "sinusoidal"},
        {"n_inner": 7},
    ],
    ids=str,
)
def test_the_number_of_parameters_is_that_of_the_model(settings: dict) -> None:
    config = GPTConfig(**{"vocab_size": 11, "n_positions": 5, "n_embd": 8, "n_layer": 3, "n_head": 2} | settings)
    assert config.num_parameters == GPT(config).num_parameters()
