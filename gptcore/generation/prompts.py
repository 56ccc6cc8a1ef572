"""Reading prompts: tensors with padding on the left, or lists of token ids, arrays or tensors of any lengths."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor] | Iterable[Any]  # NumPy's arrays are among the last

EMPTY = "each prompt needs a token or more; to begin from nothing, pass the beginning-of-text token"


def read_prompts(input_ids: Prompts, attention_mask: Tensor | None) -> tuple[list[list[int]], list[int]]:
    """Return the rows of token ids, and for each the number of padding tokens on its left.

    Raises ValueError or TypeError for anything but token ids, for empty prompts, and for padding elsewhere.
    """
    if isinstance(input_ids, Tensor):
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids should be (batch, length) with a token or more, not {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids should be int64 or int32, not {input_ids.dtype}")
        rows = input_ids.tolist()
        return rows, [0] * len(rows) if attention_mask is None else _padding(input_ids, attention_mask)
    if attention_mask is not None:
        raise ValueError("attention_mask goes with a tensor; a list of prompts of different lengths needs none")
    if isinstance(input_ids, str) or not isinstance(input_ids, Iterable):
        raise TypeError(f"input_ids should be prompts, each a list of token ids, not {input_ids!r}")
    rows = [_prompt(prompt) for prompt in input_ids]
    if not rows or not all(rows):
        raise ValueError(EMPTY)
    return rows, [0] * len(rows)


def _prompt(prompt: Any) -> list[int]:
    """Return the token ids of a list, an array or a tensor."""
    if isinstance(prompt, str | bytes) or getattr(prompt, "ndim", 1) != 1 or not isinstance(prompt, Iterable):
        raise TypeError("input_ids should be a list of prompts, each a list of token ids: [ids] for a single one")
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)  # arrays and tensors: one transfer
    if any(isinstance(token, bool) for token in tokens):
        raise TypeError("token ids should be whole numbers, not True and False")
    return [operator.index(token) for token in tokens]


def _padding(input_ids: Tensor, attention_mask: Tensor) -> list[int]:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} should have the shape of input_ids {tuple(input_ids.shape)}"
        )
    pads: list[int] = (input_ids.shape[1] - attention_mask.long().sum(1)).tolist()
    for pad, row in zip(pads, attention_mask.tolist(), strict=True):
        if row != [0] * pad + [1] * (len(row) - pad) or row[-1] != 1:
            raise ValueError("generate needs prompts padded on the left: each row of attention_mask zeros, then ones")
    return pads
