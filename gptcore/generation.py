"""Text generation, a pure function of tokens: prefill the prompts once, then decode by tokens from a KV cache."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.modes import module_mode

if TYPE_CHECKING:
    from gptcore.model import GPT


class KVCache:
    """Keys and values of the tokens so far: of each layer (B, H, capacity, D), of which the first `length` are filled.

    Allocated when a layer first writes, in the dtype and on the device of its keys; written in place from then on.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # of the tokens that every layer has seen: advanced by the model when its last layer is done
        self.layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) keys and values after the `length` filled ones; return all of the filled part, strided.

        Raises ValueError where they do not fit.
        """
        B, H, T, D = k.shape
        end = self.length + T
        if end > self.capacity:
            raise ValueError(f"{self.length} + {T} tokens do not fit into a KV cache of {self.capacity}")
        if layer == len(self.layers):
            self.layers.append((k.new_empty(B, H, self.capacity, D), v.new_empty(B, H, self.capacity, D)))
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def generate(
    model: GPT,
    input_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int | None = None,
    min_new_tokens: int = 0,
    num_return_sequences: int = 1,
    eos_token_id: int | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each prompt by `max_new_tokens` tokens: (B, T) -> (B, T + max_new_tokens) int64, prompts included.

    With num_return_sequences, B rows become B * num_return_sequences.

    input_ids: a (B, T) tensor, in which attention_mask (B, T) marks padding on the left by zeros; or a list of B lists
        of token ids of any lengths, which are padded on the left to the longest, T.
    do_sample: False takes the likeliest token; True draws one from softmax(logits / temperature), limited to the top_k
        likeliest tokens, then to the fewest likeliest ones whose probability reaches top_p (Holtzman et al. 2020).
    repetition_penalty: the logit of each token that is in the row already is divided by it, or multiplied where it is
        negative (after Keskar et al. 2019, section 4.1); 1 does nothing.
    no_repeat_ngram_size: so many tokens in succession never come twice in a row, prompt included; None sets no limit.
    min_new_tokens: the end token is not among the first so many.
    num_return_sequences: rows drawn for each prompt, one after another; more than one needs do_sample=True.
    eos_token_id: a row is filled with padding (config.pad_token_id, or the end token) after it. None means
        config.eos_token_id; -1 means that nothing ends a row.
    seed: of the draws, which never touch PyTorch's global generators; None means a new one each time. Greedy tokens are
        the same for every seed.
    vocab_size: of the tokenizer, if the model's was padded to a round number: no token from there on is ever taken.
    use_cache: False computes the whole sequence again for every token, slowly, as a check.

    The model is in eval mode for the time of the call. Raises ValueError or TypeError before any work for arguments
    that cannot be served, and FloatingPointError where the model computes logits that are not finite.
    """
    _check_options(max_new_tokens, do_sample, temperature, top_k, top_p, seed)
    _check_limits(repetition_penalty, no_repeat_ngram_size, min_new_tokens, num_return_sequences, do_sample)
    config = model.config
    if eos_token_id is None:
        eos_token_id = -1 if config.eos_token_id is None else config.eos_token_id
    elif not -1 <= eos_token_id < config.vocab_size:
        raise ValueError(f"eos_token_id {eos_token_id} is outside the vocabulary of {config.vocab_size} tokens")
    fill = config.pad_token_id if config.pad_token_id is not None else max(eos_token_id, 0)
    if vocab_size is not None and not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size {vocab_size} should be between 1 and the model's {config.vocab_size} tokens")
    device = next(model.parameters()).device
    prompts, pads = _left_padded(input_ids, attention_mask, fill, device)
    prompts, pads = (rows.repeat_interleave(num_return_sequences, 0) for rows in (prompts, pads))
    B, T = prompts.shape
    longest = T - int(pads.min())
    if longest + max_new_tokens > config.n_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are {longest + max_new_tokens}, "
            f"but this model has {config.n_positions} positions"
        )
    generator = torch.Generator(device)
    generator.manual_seed(generator.seed() if seed is None else seed)

    ids = prompts.new_full((B, T + max_new_tokens), fill)
    ids[:, :T] = prompts
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    cache = KVCache(T + max_new_tokens) if use_cache else None
    with module_mode(model, training=False), torch.no_grad():  # inference_mode would make ids unusable in training
        for t in range(T, T + max_new_tokens):
            if cache is None or cache.length == 0:
                logits = prefill(model, ids[:, :t], pads, cache)
            else:
                logits = decode(model, ids[:, t - 1 : t], pads, cache)
            logits = logits[:, :vocab_size]
            if not logits.isfinite().all():
                raise FloatingPointError(f"logits for token {t} are not finite: the model's weights are damaged")
            logits = limited(logits, ids[:, :t], pads, repetition_penalty, no_repeat_ngram_size)
            if t - T < min_new_tokens and 0 <= eos_token_id < logits.shape[-1]:
                logits[:, eos_token_id] = -torch.inf
            if (logits.amax(-1) == -torch.inf).any():
                raise ValueError(f"no token is left that could be token {t}: loosen the limits on repetition")
            token = sample(logits, generator, temperature, top_k, top_p) if do_sample else logits.argmax(-1)
            ids[:, t] = token.masked_fill(ended, fill)
            ended |= token == eos_token_id
            if ended.all():
                break
    return ids


def prefill(model: GPT, ids: Tensor, pads: Tensor, cache: KVCache | None) -> Tensor:
    """Logits (B, V) after whole sequences (B, T), the first pads (B,) tokens of which are padding; fills the cache."""
    mask = torch.arange(ids.shape[1], device=ids.device) >= pads[:, None]  # (B, T)
    return model(ids, mask if pads.any() else None, cache=cache, logits_to_keep=1).logits[:, -1].float()


def decode(model: GPT, token: Tensor, pads: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) after one more token a row, (B, 1), given all that the cache holds, pads (B,) of it padding."""
    position_ids = (cache.length - pads)[:, None]  # (B, 1): padding has no position
    segments = None
    if pads.any():  # then a row is two segments: its padding, without a query, and all the rest, with its one query
        row, L = torch.arange(len(pads), device=pads.device), cache.length + 1
        queries = torch.stack([row, row + 1], 1).flatten()  # where the segments of each row end
        keys = torch.stack([row * L + pads, (row + 1) * L], 1).flatten()
        segments = F.pad(queries, (1, 0)), F.pad(keys, (1, 0))
    return model(token, cu_seqlens=segments, position_ids=position_ids, cache=cache).logits[:, -1].float()


def limited(
    logits: Tensor, ids: Tensor, pads: Tensor, repetition_penalty: float, no_repeat_ngram_size: int | None
) -> Tensor:
    """Logits (B, V) after the limits on repetition, given the tokens so far (B, t), of which pads (B,) are padding."""
    V, t = logits.shape[-1], ids.shape[1]
    if repetition_penalty != 1.0:
        text = torch.arange(t, device=ids.device) >= pads[:, None]
        penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(_among(ids, text, V), penalised, logits)
    if no_repeat_ngram_size is not None and t >= no_repeat_ngram_size:
        grams = ids.unfold(1, no_repeat_ngram_size, 1)  # (B, t - n + 1, n)
        repeated = (grams[..., :-1] == ids[:, None, t - no_repeat_ngram_size + 1 :]).all(-1)
        repeated &= torch.arange(grams.shape[1], device=ids.device) >= pads[:, None]
        logits = logits.masked_fill(_among(grams[..., -1], repeated, V), -torch.inf)
    return logits


def _among(tokens: Tensor, counts: Tensor, V: int) -> Tensor:
    """Whether each of V tokens is among those of (B, N) tokens that count: (B, V) bool."""
    found = torch.zeros(len(tokens), V + 1, dtype=torch.bool, device=tokens.device)
    return found.scatter_(1, tokens.clamp(max=V).masked_fill(~counts, V), True)[:, :V]


def sample(
    logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """One token (B,) from logits (B, V), drawn as `generate` says."""
    V = logits.shape[-1]
    logits, candidates = logits.topk(V if top_k is None else min(top_k, V))  # the likeliest first
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(-1)  # no temperature can overflow
    if top_p is not None and top_p < 1:
        reached = probabilities.cumsum(-1)[:, :-1] >= top_p
        probabilities[:, 1:].masked_fill_(reached, 0)  # the first stays, whatever top_p
    return candidates.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def _left_padded(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, fill: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The prompts (B, T) in int64 and the number of padding tokens on the left of each (B,)."""
    if isinstance(input_ids, Tensor):
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids should be (batch, length) with a token or more, not {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids should be int64 or int32, not {input_ids.dtype}")
        ids = input_ids.long()
        if attention_mask is None:
            return ids, torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} should have the shape of input_ids {tuple(ids.shape)}"
            )
        pads = ids.shape[1] - attention_mask.long().sum(1)
        expected = torch.arange(ids.shape[1], device=ids.device) >= pads[:, None]
        if not torch.equal(attention_mask, expected.to(attention_mask.dtype)) or not attention_mask[:, -1].all():
            raise ValueError("generate needs prompts padded on the left: each row of attention_mask zeros, then ones")
        return ids, pads
    if attention_mask is not None:
        raise ValueError("attention_mask goes with a tensor; a list of prompts of different lengths needs none")
    if any(isinstance(prompt, int | str) for prompt in input_ids):
        raise TypeError("input_ids should be a list of prompts, each a list of token ids: [ids] for a single one")
    if not input_ids or not all(input_ids):
        raise ValueError("each prompt needs a token or more; to begin from nothing, pass the beginning-of-text token")
    longest = max(len(prompt) for prompt in input_ids)
    rows = [[fill] * (longest - len(prompt)) + [operator.index(token) for token in prompt] for prompt in input_ids]
    return torch.tensor(rows, device=device), longest - torch.tensor([len(p) for p in input_ids], device=device)


def _check_limits(
    repetition_penalty: float,
    no_repeat_ngram_size: int | None,
    min_new_tokens: int,
    num_return_sequences: int,
    do_sample: bool,
) -> None:
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty should be positive and finite, not {repetition_penalty}; 1 does nothing")
    for name, value, least in (
        ("no_repeat_ngram_size", no_repeat_ngram_size, 1),
        ("min_new_tokens", min_new_tokens, 0),
        ("num_return_sequences", num_return_sequences, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} should be a whole number of at least {least}, not {value!r}")
    if num_return_sequences > 1 and not do_sample:
        raise ValueError(f"num_return_sequences={num_return_sequences} would be one text as often: pass do_sample=True")


def _check_options(
    max_new_tokens: int, do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} should be a whole number of at least 1, not {value!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature should be positive and finite, not {temperature}; do_sample=False is greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p should be in (0, 1], not {top_p}")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ValueError(f"seed should be a whole number in [0, 2**63), not {seed!r}")
    if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("temperature, top_k and top_p are for sampling: pass do_sample=True or leave them out")
