"""Export models in other programs' formats: GGUF for llama.cpp, and a folder that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptcore.config import GELU_FORMS, GPTConfig
from gptcore.files import PathLike, atomic_file
from gptcore.hf.gguf_weights import gguf_name
from gptcore.lora.adapters import base_state
from gptcore.ops.quantized_linear import BLOCK, BYTES, dequantize
from gptcore.quantized import kinds_of

if TYPE_CHECKING:
    from gptcore.model import GPT
    from gptcore.text.tokenizer import Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK_KINDS = tuple(BYTES)
PROJECTIONS = ("wte.weight", "lm_head.weight")  # 8 bits in a q4_0 file


def export_gguf(
    model: GPT, tokenizer: Tokenizer, path: PathLike, dtype: str | None = None, name: str = "gptcore"
) -> None:
    """Write one GGUF file, whole or not at all, which llama.cpp and what is built on it run as a gpt2.

    dtype: f32, f16, bf16, q8_0 or q4_0; None is the model's own, float64 as f32. The last two are blocks of 32 numbers,
        each 8 or 4 bits times the block's 16-bit scale; with q4_0 token embedding and output projection are q8_0. The
        blocks of a quantized model are written as they are, or decoded to a dtype that is not quantized.
        Vectors and position embeddings are float32 always, as llama.cpp has them. A tied output projection is not
        written twice: llama.cpp takes the token embedding where there is no output.weight (since March 2025).
    name: of the model, as llama.cpp shows it.

    Raises ValueError for a model or tokenizer that llama.cpp would compute something else with, and for a weight that
    does not fit into the dtype; ImportError without the package gguf.
    """
    state = base_state(model)
    quantized = kinds_of(model)
    own = _own_dtype(model, quantized)
    dtype = own if dtype is None else dtype
    _check_model(model.config, dtype)
    if quantized and dtype in BLOCK_KINDS and dtype != own:
        raise ValueError(f"the model is {own} already; make {dtype} from the model that it was made from")
    try:
        import gguf
    except ImportError as error:
        raise ImportError('writing GGUF needs the package gguf: pip install "gptcore[export]"') from error
    kinds = {
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
        "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    }
    file_type = kinds[dtype][1]
    config = model.config
    words = _vocabulary(config, tokenizer)
    with atomic_file(path) as aside:
        writer = gguf.GGUFWriter(aside, "gpt2")
        writer.add_name(name)
        writer.add_file_type(file_type)
        if dtype in BLOCK_KINDS:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")  # how a text is cut into words: GPT-2's regular expression
        writer.add_token_list(words["tokens"])
        writer.add_token_types(words["types"])
        writer.add_token_merges(words["merges"])
        writer.add_bos_token_id(words["end"] if config.bos_token_id is None else config.bos_token_id)
        writer.add_eos_token_id(words["end"])
        if tokenizer.pad_token is not None:
            writer.add_pad_token_id(tokenizer.special_tokens[tokenizer.pad_token])
        writer.add_add_bos_token(False)
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)
        for ours, tensor in sorted(state.items(), key=_order(model)):
            if ours in quantized and dtype in BLOCK_KINDS:
                writer.add_tensor(gguf_name(ours), tensor.cpu().numpy(), raw_dtype=kinds[quantized[ours]][0])
                continue
            values = _values(ours, dequantize(tensor, quantized[ours]) if ours in quantized else tensor)
            if tensor.ndim == 1 or ours == "wpe.weight" or dtype == "f32":
                writer.add_tensor(gguf_name(ours), values)
            else:
                kind = kinds["q8_0" if dtype == "q4_0" and ours in PROJECTIONS else dtype][0]
                with np.errstate(over="ignore", invalid="ignore"):
                    packed = gguf.quants.quantize(values, kind)
                    if dtype in ("f16", *BLOCK_KINDS) and not np.isfinite(gguf.quants.dequantize(packed, kind)).all():
                        largest = np.abs(values).max()
                        raise ValueError(f"{ours} holds {largest:.6g}, which {dtype} cannot; export bf16 or f32")
                writer.add_tensor(gguf_name(ours), packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def export_hf(model: GPT, tokenizer: Tokenizer, directory: PathLike, dtype: str | None = None) -> None:
    """Write a folder that transformers opens as GPT2LMHeadModel or OpenAIGPTLMHeadModel, with its tokenizer.

    dtype: f32, f16 or bf16; None keeps the model's. Raises ValueError for a model that transformers does not have, or
    that the dtype cannot hold. The model itself is converted.
    """
    if not (model.config.is_gpt1 or model.config.is_gpt2):
        raise ValueError(f"transformers would compute something else from this model: {_difference(model.config)}")
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"a folder for transformers is f32, f16 or bf16, not {dtype}")
        model.to(DTYPES[dtype])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _order(model: GPT) -> Callable[[tuple[str, Tensor]], tuple[int, bool]]:
    """Return a key that sorts weights by module, the bias last: state_dict has buffers, as blocks are, after it."""
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return lambda item: (places[item[0].rpartition(".")[0]], item[0].endswith(".bias"))


def _own_dtype(model: GPT, quantized: Mapping[str, str]) -> str:
    """Return the name of the model's dtype, or of the kind in which most of its weights are."""
    if quantized:
        kinds = [kind for name, kind in quantized.items() if name not in PROJECTIONS] or list(quantized.values())
        return max(BLOCK_KINDS, key=kinds.count)
    return next((short for short, kind in DTYPES.items() if kind == model.wte.weight.dtype), "f32")


def _check_model(config: GPTConfig, dtype: str) -> None:
    if dtype not in (*DTYPES, *BLOCK_KINDS):
        raise ValueError(f"dtype {dtype!r} is not supported; it should be f32, f16, bf16, q8_0 or q4_0")
    check_published(config)
    for name, width in (("n_embd", config.n_embd), ("n_inner", config.n_inner or 4 * config.n_embd)):
        if dtype in BLOCK_KINDS and width % BLOCK != 0:
            raise ValueError(f"{dtype} packs {BLOCK} numbers of a row together, but {name} is {width}; use f16 or bf16")


def check_published(config: GPTConfig) -> None:
    """Raise ValueError for a model that is not a GPT-2 as llama.cpp computes it."""
    if difference := _difference(config):
        raise ValueError(f"llama.cpp's gpt2 would compute something else from this model: {difference}")


def _difference(config: GPTConfig) -> str:
    """Return the settings that differ from those of GPT-2 as OpenAI published it; or an empty string."""
    published = GPTConfig()
    names = """
        norm_position position_embedding attention_window scale_attn_weights scale_attn_by_inverse_layer_idx
    """
    odd = [name for name in names.split() if getattr(config, name) != getattr(published, name)]
    if GELU_FORMS[config.activation_function] != "tanh":
        odd.append("activation_function")
    return ", ".join(f"{name} is {getattr(config, name)!r}" for name in odd)


def _values(name: str, tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite")
    return values


def _vocabulary(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer as llama.cpp has it: words in byte-level letters, kinds, merges; padding is unusable."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model only {config.vocab_size}")
    state = json.loads(tokenizer._tokenizer.to_str())
    if tokenizer.kind != "bpe":
        raise ValueError(
            f"llama.cpp cuts text into words before it encodes them; a tokenizer of kind {tokenizer.kind!r} does not; "
            "train one of kind 'bpe' to run the model there"
        )
    end = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if end is None:
        raise ValueError("llama.cpp needs to know which token ends a text, but neither config nor tokenizer has one")
    normal, control, user_defined, unused = 1, 3, 4, 5  # gguf.TokenType
    known = {i: (word, normal) for word, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        known[token["id"]] = token["content"], control if token["special"] else user_defined
    taken = {word for word, _ in known.values()}
    words = []
    for i in range(config.vocab_size):
        filler = f"[PAD{i}]"
        while filler in taken:  # llama.cpp refuses a token that is there twice
            filler = f"[{filler}]"
        words.append(known.get(i, (filler, unused)))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    return {"tokens": [word for word, _ in words], "types": [kind for _, kind in words], "merges": merges, "end": end}
