"""Keys and values of rows that share passes of any composition: parts of prompts beside single tokens.

A token's logits and its keys and values have the same bits, on the CPU, whatever else is in the pass and however its
text is divided into passes: all products are by rows, and queries attend at most GROUP at a time, as in decoding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcore.generation.cache import KVCache, new_memory
from gptcore.generation.step import native_logits

if TYPE_CHECKING:
    from gptcore.model import GPT


class Slots(KVCache):
    """A KVCache of a fixed number of rows, each with room for all positions. The caller counts the tokens of a row."""

    def __init__(self, model: GPT, rows: int) -> None:
        super().__init__(model.config.n_positions)
        self.memory = new_memory(model, rows, self.capacity)
        self.layers = list(self.memory)

    def read(self, model: GPT, tokens: list[int], rows: list[int], places: list[int], kept: list[int]) -> Tensor:
        """Return float32 logits (kept, V) of some tokens, given the row and the place in it of each token.

        Tokens of a row are adjacent and in order; those before them were read earlier.
        """
        logits = native_logits(model, tokens, self.layers, rows, places, kept)
        if logits is None:
            starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
            self._group((rows[a], places[a], b - a) for a, b in pairwise([*starts, len(rows)]))
            device = self.memory.device
            ids, at = torch.tensor([tokens], device=device), torch.tensor([places], device=device)
            chosen = torch.tensor(kept, dtype=torch.int64, device=device)
            logits = model(ids, position_ids=at, cache=self, logits_to_keep=chosen).logits[0]
        return logits.float()

    def begin(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        return None  # `read` passes the positions

    def attend(self, layer: int, qkv: Tensor, cu_seqlens: Tensor | None, **settings: Any) -> Tensor:
        return self._attend_in_groups(layer, qkv, settings)

    def end(self) -> None:
        pass
