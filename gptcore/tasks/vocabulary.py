"""New tokens for a model: rows of its embeddings and output projection. Adapters that come with new tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gptcore.files import PathLike
from gptcore.hf.hub import find_folder
from gptcore.lora import load_adapter, merge_adapter
from gptcore.lora.files import CONFIG, WEIGHTS
from gptcore.model import GPT
from gptcore.quantized import kinds_of
from gptcore.text.tokenizer import FILES, Tokenizer


@torch.no_grad()
def add_tokens(model: GPT, before: int, after: int) -> list[int]:
    """Give a model rows for the tokens from `before` to `after`, which its tokenizer got; returns their ids.

    Each row is the mean of those of the tokens before, so that no new token is likely or unlikely beforehand. Rows that
    only fill up a padded vocabulary are taken first. Raises ValueError for a quantized model.
    """
    new = list(range(before, after))
    if not new:
        return new
    if kinds_of(model):
        raise ValueError("a quantized model has no rows to add; load it with a dtype such as torch.float32")
    size = max(after, model.config.vocab_size)
    layers: list[nn.Embedding | nn.Linear] = [model.wte, *([] if model.lm_head is None else [model.lm_head])]
    for layer in layers:
        weight = layer.weight
        rows = weight.new_empty(size, weight.shape[1])
        rows[: len(weight)] = weight
        rows[before:after] = weight[:before].float().mean(0).to(weight.dtype)
        layer.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
    model.wte.num_embeddings = size
    if model.lm_head is not None:
        model.lm_head.out_features = size
    model.config = dataclasses.replace(model.config, vocab_size=size)
    return new


def use_adapter(model: GPT, tokenizer: Tokenizer, name_or_path: PathLike) -> Tokenizer:
    """Load an adapter into a model and select it; returns the tokenizer that it was trained with.

    The adapter's folder has that tokenizer if it trains new tokens. In a model of 32 bits or more the adapter is
    merged, for speed; in 16 bits that would round it away, and quantized weights cannot be changed.
    Raises ValueError for a tokenizer that does not continue the model's, and whatever load_adapter raises.
    """
    folder = find_folder(name_or_path, [CONFIG, WEIGHTS, *FILES])
    if (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.from_pretrained(folder)
        count = tokenizer.vocab_size
        if theirs.vocab_size < count or theirs.kind != tokenizer.kind or theirs._bytes[:count] != tokenizer._bytes:
            raise ValueError(f"{folder} has another tokenizer than the model, not one with more tokens: wrong base?")
        add_tokens(model, count, theirs.vocab_size)
        tokenizer = theirs
    load_adapter(model, folder)
    if not kinds_of(model) and model.wte.weight.dtype.itemsize > 2:
        merge_adapter(model, keep_original=False)
    return tokenizer
