"""The configuration of a GPT model, in one flat dataclass, and presets of published models."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# transformers' names of activation_function, and the form of GELU that each means. "gelu" is exact (erf); GPT-1, GPT-2
# and GPT-3 were all trained with the tanh form.
GELU_FORMS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "none"),
}
MAX_HEAD_DIM = 256  # of the attention kernels
# Far above any published model. Larger sizes are mistakes, or crafted files that would exhaust memory.
LARGEST = {
    **dict.fromkeys(("vocab_size", "n_positions", "attention_window"), 2**31 - 1),
    **dict.fromkeys(("n_embd", "n_head", "n_inner"), 2**20),
    "n_layer": 10_000,
}
IGNORED = -100  # label that the loss leaves out, as in F.cross_entropy

# Further keys of a config.json that transformers wrote. _BOOKKEEPING has no effect on the model; _FIXED changes what it
# computes, so only the value of GPT-1 and GPT-2 is accepted.
_BOOKKEEPING = """
    _attn_implementation_autoset _name_or_path _num_labels architectures attn_implementation bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label is_decoder label2id length_penalty max_length min_length n_special no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past output_scores
    predict_special_tokens prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    xla_device
"""
_FIXED = {
    "add_cross_attention": False,
    "afn": "gelu",  # GPT-1's name of activation_function, in which "gelu" is the tanh form
    "is_encoder_decoder": False,
    "pruned_heads": {},
}

# Defaults of a GPT-1's config.json that differ from GPT-2's
_OPENAI_GPT = {
    "vocab_size": 40478,
    "n_positions": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "norm_position": "post",
}
_GPT1 = {key: _OPENAI_GPT[key] for key in ("vocab_size", "n_positions", "norm_position")}
# Table 2.1 of Brown et al. 2020 has two misprints, corrected here: the 1.3B (width 2048) has 16 heads of 128, not 24;
# the 13B (40 heads of 128) has a width of 5120, not 5140. The paper does not state the width of the attention band in
# every second layer (section 2.1): 256 is GPT-Neo's.
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT3 = {"n_positions": 2048, "attention_window": 256, **_NO_DROPOUT}
_LAPTOP = {"n_positions": 256, **_NO_DROPOUT}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt": _GPT1,  # Radford et al. 2018
    "gpt2": {},  # Radford et al. 2019, and its three larger siblings
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
    "gpt3-125m": _GPT3,
    "gpt3-350m": {"n_layer": 24, "n_embd": 1024, "n_head": 16, **_GPT3},
    "gpt3-760m": {"n_layer": 24, "n_embd": 1536, "n_head": 16, **_GPT3},
    "gpt3-1.3b": {"n_layer": 24, "n_embd": 2048, "n_head": 16, **_GPT3},
    "gpt3-2.7b": {"n_layer": 32, "n_embd": 2560, "n_head": 32, **_GPT3},
    "gpt3-6.7b": {"n_layer": 32, "n_embd": 4096, "n_head": 32, **_GPT3},
    "gpt3-13b": {"n_layer": 40, "n_embd": 5120, "n_head": 40, **_GPT3},
    "gpt3-175b": {"n_layer": 96, "n_embd": 12288, "n_head": 96, **_GPT3},
    "gpt-nano": {"n_layer": 3, "n_embd": 48, "n_head": 3, **_LAPTOP},  # these three are minGPT's
    "gpt-micro": {"n_layer": 4, "n_embd": 128, "n_head": 4, **_LAPTOP},
    "gpt-mini": {"n_layer": 6, "n_embd": 192, "n_head": 6, **_LAPTOP},
    "gpt-baby": {"n_layer": 6, "n_embd": 384, "n_head": 6, **_LAPTOP},  # nanoGPT's, for Shakespeare by characters
}


def _option(default: Any, text: str) -> Any:
    """Return a dataclass field whose description becomes its line in --help and in the documentation."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GPTConfig:
    """Configuration of a GPT, with the names and defaults of transformers' GPT2Config.

    The last three fields select the variants of GPT-1 and GPT-3. `GPTConfig.preset("gpt2-medium")` returns the
    configuration of a published model.

    Raises TypeError or ValueError, with the number in question, for settings that are invalid or contradict each other.
    """

    vocab_size: int = _option(50257, "number of tokens in the vocabulary")
    n_positions: int = _option(1024, "longest sequence, in tokens")
    n_embd: int = _option(768, "width of the residual stream")
    n_layer: int = _option(12, "number of blocks")
    n_head: int = _option(12, "attention heads in each block; must divide n_embd")
    n_inner: int | None = _option(None, "width inside the MLP, or none for 4 * n_embd")
    activation_function: str = _option("gelu_new", "gelu_new (tanh form), gelu (erf form) or a synonym")
    resid_pdrop: float = _option(0.1, "dropout on the output of each attention and MLP")
    embd_pdrop: float = _option(0.1, "dropout on the sum of token and position embeddings")
    attn_pdrop: float = _option(0.1, "dropout on the attention probabilities")
    layer_norm_epsilon: float = _option(1e-5, "added to the variance in every layer norm")
    initializer_range: float = _option(0.02, "standard deviation of the initial weights")
    tie_word_embeddings: bool = _option(True, "use the token embedding as the output projection too")
    scale_attn_weights: bool = _option(True, "divide attention scores by sqrt(head_dim)")
    scale_attn_by_inverse_layer_idx: bool = _option(False, "also divide attention scores by the layer's number, from 1")
    reorder_and_upcast_attn: bool = _option(False, "no effect: the softmax is always computed in float32")
    bos_token_id: int | None = _option(50256, "token that begins a text; 50256 is dropped if the vocabulary is smaller")
    eos_token_id: int | None = _option(50256, "token that ends a text; 50256 is dropped if the vocabulary is smaller")
    pad_token_id: int | None = _option(None, "token that pads a batch, or none for eos_token_id")
    norm_position: str = _option("pre", "layer norm before attention and MLP (pre: GPT-2, 3) or after (post: GPT-1)")
    position_embedding: str = _option("learned", "learned, or sinusoidal: fixed, as in 'Attention Is All You Need'")
    attention_window: int | None = _option(None, "keys that a query attends to in odd layers (GPT-3), or none for all")

    def __post_init__(self) -> None:
        for name, maximum in LARGEST.items():
            if getattr(self, name) is not None or name not in ("n_inner", "attention_window"):
                self._check_int(name, minimum=1, maximum=maximum)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self._check_token(name)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= self._number(name) < 1:
                raise ValueError(f"{name} is a probability in [0, 1), not {getattr(self, name)}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0 < self._number(name) < math.inf:
                raise ValueError(f"{name} should be positive and finite, not {getattr(self, name)}")
        for name in (
            "tie_word_embeddings",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} should be True or False, not {getattr(self, name)!r}")
        self._check_choice("activation_function", GELU_FORMS)
        self._check_choice("norm_position", ("pre", "post"))
        self._check_choice("position_embedding", ("learned", "sinusoidal"))
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"n_embd {self.n_embd} over n_head {self.n_head} is {self.head_dim} dimensions a head, "
                f"but the attention kernels do {MAX_HEAD_DIM} at most; use more heads"
            )
        if self.position_embedding == "sinusoidal" and self.n_embd % 2 != 0:
            raise ValueError(f"sinusoidal positions are pairs of a sine and a cosine, but n_embd is odd: {self.n_embd}")

    @property
    def head_dim(self) -> int:
        """Return the number of dimensions of one attention head."""
        return self.n_embd // self.n_head

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters, without building the model; GPT.num_parameters() counts those of a model."""
        C, inner = self.n_embd, self.n_inner if self.n_inner is not None else 4 * self.n_embd
        block = 4 * C + 4 * (C * C + C) + 2 * C * inner + inner + C  # two norms, c_attn and c_proj, c_fc and c_proj
        positions = self.n_positions if self.position_embedding == "learned" else 0
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size + positions
        return self.n_layer * block + C * embeddings + 2 * C * (self.norm_position == "pre")

    @property
    def n_ctx(self) -> int:
        """Return n_positions; n_ctx is its name in old config files and programs."""
        return self.n_positions

    @property
    def is_gpt1(self) -> bool:
        """Return whether transformers' OpenAIGPTLMHeadModel computes the same function from the same weights."""
        return (
            (self.norm_position, self.position_embedding, self.attention_window) == ("post", "learned", None)
            and GELU_FORMS[self.activation_function] == "tanh"
            and self.n_inner in (None, 4 * self.n_embd)
            and (self.scale_attn_weights, self.scale_attn_by_inverse_layer_idx) == (True, False)
        )

    @property
    def is_gpt2(self) -> bool:
        """Return whether transformers' GPT2LMHeadModel computes the same function from the same weights."""
        return (self.norm_position, self.position_embedding, self.attention_window) == ("pre", "learned", None)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """Return the config of a published model, such as "gpt2-medium" or "gpt3-1.3b"; overrides replace settings.

        Names: gpt; gpt2, gpt2-medium, gpt2-large, gpt2-xl; gpt3-125m, -350m, -760m, -1.3b, -2.7b, -6.7b, -13b, -175b;
        and, for a laptop, gpt-nano, gpt-micro, gpt-mini, gpt-baby. GPT-3's dropout is not published: it is 0 here.
        Raises ValueError for an unknown name, with the nearest known one.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0)[0]
            raise ValueError(f"there is no preset {name!r}; the nearest of the {len(PRESETS)} is {near!r}")
        return cls(**{**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of config.json; transformers loads it if its GPT-1 or GPT-2 computes the same."""
        kind: dict[str, Any] = {"model_type": "gptcore"}
        if self.is_gpt1:
            kind = {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu"}
        elif self.is_gpt2:
            kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        return {**kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """Return the config for the contents of a config.json, from gptcore or from transformers' GPT-1 or GPT-2.

        Raises ValueError for an unknown key, naming the nearest known one, and for a setting that GPT does not support.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        kind = values.get("model_type", "gptcore")
        if kind not in ("gpt2", "openai-gpt", "gptcore"):
            raise ValueError(f"model_type {kind!r} is not a GPT; it should be 'gpt2', 'openai-gpt' or 'gptcore'")
        kwargs: dict[str, Any] = dict(_OPENAI_GPT) if kind == "openai-gpt" else {}
        if "n_ctx" in values:  # old files have both names, or this one only
            kwargs["n_positions"] = values["n_ctx"]
        for key, value in values.items():
            if key in known:
                kwargs[key] = value
            elif key in _FIXED and value != _FIXED[key]:
                raise ValueError(f"{key} {value!r} is not supported; it should be {_FIXED[key]!r}")
            elif key not in (*_BOOKKEEPING.split(), *_FIXED, "model_type", "n_ctx"):
                near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise ValueError(f"unknown key {key!r}; the nearest known one is {near!r}")
        config = cls(**kwargs)
        if values.get("n_ctx", config.n_positions) != config.n_positions:
            raise ValueError(f"n_ctx {values['n_ctx']} and n_positions {config.n_positions} should be equal")
        return config

    def _check_int(self, name: str, minimum: int, maximum: int | None = None) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} should be a whole number, not {value!r}")
        if value < minimum:
            raise ValueError(f"{name} should be at least {minimum}, not {value}")
        if maximum is not None and value > maximum:
            raise ValueError(f"{name} should be at most {maximum:,}, not {value:,}")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} should be a number, not {value!r}")
        return value

    def _check_token(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        self._check_int(name, minimum=0)
        if value >= self.vocab_size:
            if value != GPTConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name} {value} is outside the vocabulary of {self.vocab_size} tokens")
            # GPT-2's id with a smaller vocabulary: the default was not overridden, or transformers wrote the file
            object.__setattr__(self, name, None)

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in tuple(choices):
            raise ValueError(f"{name} {value!r} is not supported; it should be one of {', '.join(choices)}")
