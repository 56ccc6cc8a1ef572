"""Text generation: `stream` yields tokens as they come, `generate` collects them; both use `Batch`."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptcore.generation.batch import Batch, Token
from gptcore.generation.cache import KVCache
from gptcore.generation.prompts import Prompts, read_prompts
from gptcore.generation.sampling import Settings, whole_number

if TYPE_CHECKING:
    from gptcore.model import GPT

__all__ = ["Batch", "KVCache", "Prompts", "Settings", "Token", "generate", "stream"]


def stream(
    model: GPT,
    input_ids: Prompts,
    max_new_tokens: int,
    *,
    num_return_sequences: int = 1,
    attention_mask: Tensor | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    **settings: Any,
) -> Iterator[Token]:
    """Continue prompts as `generate` does; yield each token as soon as it is chosen.

    Tokens come step by step, in a step row by row, each with the number of its row. The last of a row has a
    finish_reason. Arguments are checked before the first token; errors are those of `generate`.

    vocab_size: of the tokenizer, if the model's was padded to a round number: no token from there on is ever taken.
    use_cache: False computes the whole sequence again for every token, slowly, as a check.
    """
    rows, pads = read_prompts(input_ids, attention_mask)
    options = Settings(max_new_tokens, **settings)
    copies = whole_number("num_return_sequences", num_return_sequences, 1)
    if copies > 1 and not options.do_sample:
        raise ValueError(f"num_return_sequences={copies} would be one text as often: pass do_sample=True")
    batch = Batch(model, vocab_size=vocab_size, use_cache=use_cache)
    seed = secrets.randbits(63) if options.seed is None else options.seed
    for number in range(copies * len(rows)):
        row = number // copies
        batch.add(rows[row][pads[row] :], dataclasses.replace(options, seed=seed_of_row(seed, number)))
    return _tokens(batch)


def _tokens(batch: Batch) -> Iterator[Token]:
    while len(batch):
        for token in batch.step():
            if token.error is not None:
                raise token.error
            yield token


def generate(
    model: GPT,
    input_ids: Prompts,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    num_return_sequences: int = 1,
    **settings: Any,
) -> Tensor:
    """Continue each prompt by `max_new_tokens` tokens: (B, T) -> (B, T + max_new_tokens) int64, prompts included.

    With num_return_sequences, B rows become B * num_return_sequences.

    input_ids: a (B, T) tensor, in which attention_mask (B, T) marks padding on the left by zeros; or B prompts of any
        lengths, each a list, an array or a tensor of token ids. They are padded on the left to the longest, T.
    num_return_sequences: rows drawn for each prompt, one after another; more than one needs do_sample=True.
    settings: vocab_size and use_cache, as `stream` says; do_sample, temperature, top_k, top_p, repetition_penalty,
        no_repeat_ngram_size, min_new_tokens, eos_token_id and seed, as `Settings` says. Row r draws from a seed made of
        `seed` and r, the first row from `seed` itself. A row is filled with padding (config.pad_token_id, or the end
        token) after its end.

    The model is in eval mode for the time of the call. Raises ValueError or TypeError before any work for arguments
    that are out of range, and FloatingPointError where the model computes logits that are not finite.
    """
    rows, pads = read_prompts(input_ids, attention_mask)
    tokens = stream(
        model, [row[pad:] for row, pad in zip(rows, pads, strict=True)], max_new_tokens,
        num_return_sequences=num_return_sequences, **settings,
    )  # fmt: skip
    eos = settings.get("eos_token_id")
    eos = model.config.eos_token_id if eos is None else eos
    fill = model.config.pad_token_id if model.config.pad_token_id is not None else max(eos or 0, 0)
    longest = max(len(row) for row in rows)
    texts = [[fill] * (longest - len(row)) + row for row in rows for _ in range(num_return_sequences)]
    for token in tokens:
        texts[token.row].append(token.token)
    whole = [text + [fill] * (longest + max_new_tokens - len(text)) for text in texts]
    return torch.tensor(whole, device=next(model.parameters()).device)


def seed_of_row(seed: int, row: int) -> int:
    """Return the seed of a row of a batch: `seed` itself for row 0, and one that depends on both for all others."""
    if row == 0:
        return seed
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))
