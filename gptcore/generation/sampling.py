"""How the next token of a row is chosen from its logits."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Temperatures and penalties are clamped to this range: in float32 they must be neither 0 nor infinite
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Settings:
    """How a row is continued.

    max_new_tokens: tokens after which it ends.
    do_sample: False takes the likeliest token; True draws one from softmax(logits / temperature), limited to the top_k
        likeliest tokens, then to the fewest likeliest ones whose probability reaches top_p (Holtzman et al. 2020).
    repetition_penalty: the logit of each token that is in the row already is divided by it, or multiplied where it is
        negative (after Keskar et al. 2019, section 4.1); 1 does nothing.
    no_repeat_ngram_size: so many tokens in succession never come twice in a row, prompt included; None sets no limit.
    min_new_tokens: the end token is not among the first so many.
    eos_token_id: the token that ends the row; None means the model's, -1 disables it.
    seed: of the row's own generator; None draws a new one each time. PyTorch's global generators are never used.

    Raises ValueError or TypeError for values that are out of range, also for those of sampling without do_sample.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int = 0
    eos_token_id: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1), ("top_k", 1), ("no_repeat_ngram_size", 1), ("min_new_tokens", 0),
            ("eos_token_id", -1), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) is not None or name in ("max_new_tokens", "min_new_tokens"):
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if not 0 < (temperature := _number("temperature", self.temperature)) < float("inf"):
            raise ValueError(f"temperature should be positive and finite, not {temperature}; do_sample=False is greedy")
        if self.top_p is not None and not 0 < _number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p should be in (0, 1], not {self.top_p}")
        if not 0 < (penalty := _number("repetition_penalty", self.repetition_penalty)) < float("inf"):
            raise ValueError(f"repetition_penalty should be positive and finite, not {penalty}; 1 does nothing")
        if self.seed is not None and self.seed >= 2**63:
            raise ValueError(f"seed should be a whole number in [0, 2**63), not {self.seed}")
        if not self.do_sample and (self.temperature != 1.0 or self.top_k is not None or self.top_p is not None):
            raise ValueError("temperature, top_k and top_p are for sampling: pass do_sample=True or leave them out")

    @property
    def limits_repetition(self) -> bool:
        """Return whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size is not None


def whole_number(name: str, value: Any, least: int) -> int:
    """Return an int, NumPy's or a tensor's included. Raises ValueError for anything else and for less than `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} should be a whole number of at least {least}, not {value!r}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} should be a number, not {value!r}") from None
    except OverflowError:  # a whole number beyond float's range
        return sys.float_info.max if value > 0 else -sys.float_info.max


def limit_repetition(logits: Tensor, ids: Tensor, settings: Settings) -> Tensor:
    """Return the logits (V,) of a row after its limits on repetition, given its tokens so far (t,)."""
    V, t, n = len(logits), len(ids), settings.no_repeat_ngram_size
    if settings.repetition_penalty != 1.0:
        penalty = min(max(settings.repetition_penalty, SMALLEST), LARGEST)
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty).clamp(-LARGEST, LARGEST)
        logits = torch.where(_among(ids, V), penalised, logits)
    if n is not None and t >= n:
        grams = ids.unfold(0, n, 1)  # (t - n + 1, n)
        repeated = (grams[:, :-1] == ids[t - n + 1 :]).all(-1)
        logits = logits.masked_fill(_among(grams[:, -1].masked_fill(~repeated, V), V), -torch.inf)
    return logits


def _among(tokens: Tensor, V: int) -> Tensor:
    """Return for each of V tokens whether it is among `tokens`, (V,) bool. Ids from V on count for nothing."""
    found = torch.zeros(V + 1, dtype=torch.bool, device=tokens.device)
    return found.index_fill_(0, tokens.clamp(max=V), True)[:V]


def sample(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    temperatures: Sequence[float],
    top_k: int | None,
    top_ps: Sequence[float | None],
) -> Tensor:
    """Draw a token a row, (N,), from logits (N, V) in float32, as Settings says. Never synchronises.

    A row's draw depends on its logits, its generator and its settings alone, if rows with and without `limits` are not
    mixed. It is torch.multinomial's of one row: the largest of p / q, where q is exponentially distributed.
    """
    V, candidates = logits.shape[-1], None
    if top_k is not None or any(limits(None, top_p) for top_p in top_ps):
        logits, candidates = logits.topk(V if top_k is None else min(top_k, V))  # in descending order
    temperature = _column([min(max(value, SMALLEST), LARGEST) for value in temperatures], logits)
    # The difference cannot overflow upwards
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if any(limits(None, top_p) for top_p in top_ps):
        top_p = _column([value if value is not None and value < 1 else 2.0 for value in top_ps], logits)
        reached = probabilities.cumsum(-1)[:, :-1] >= top_p
        probabilities[:, 1:].masked_fill_(reached, 0)  # the most likely token is always kept
    noise = torch.empty_like(probabilities)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    drawn = (probabilities / noise).masked_fill(probabilities == 0, -1).argmax(-1, keepdim=True)
    return (drawn if candidates is None else candidates.gather(-1, drawn))[:, 0]


def limits(top_k: int | None, top_p: float | None) -> bool:
    """Return whether tokens are left out, for which they have to be sorted."""
    return top_k is not None or (top_p is not None and top_p < 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
