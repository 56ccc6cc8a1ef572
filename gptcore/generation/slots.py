"""Keys and values of rows that share passes of any composition: parts of prompts beside single tokens.

A token's logits and its keys and values have the same bits, on the CPU, whatever else is in the pass and however its
text is divided into passes: all products are by rows, and queries attend at most GROUP at a time, as in decoding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcore import ops
from gptcore.generation.cache import KVCache
from gptcore.generation.step import native_logits

if TYPE_CHECKING:
    from gptcore.model import GPT

GROUP = 8  # queries of a row that attend together: as many as the decoding kernel takes


class Slots(KVCache):
    """A KVCache of a fixed number of rows, each with room for all positions. The caller counts the tokens of a row."""

    def __init__(self, model: GPT, rows: int) -> None:
        config, like = model.config, next(model.parameters())
        super().__init__(config.n_positions)
        shape = (config.n_layer, 2, rows, config.n_head, config.n_positions, config.head_dim)
        self.memory = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.layers = list(self.memory)
        self._groups: list[tuple[int, int, int, int]] = []  # first token, past the last, row, place of the first

    def read(self, model: GPT, tokens: list[int], rows: list[int], places: list[int], kept: list[int]) -> Tensor:
        """Return float32 logits (kept, V) of some tokens, given the row and the place in it of each token.

        Tokens of a row are adjacent and in order; those before them were read earlier.
        """
        logits = native_logits(model, tokens, self.layers, rows, places, kept)
        if logits is None:
            starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
            self._groups = [
                (begin, min(begin + GROUP, end), rows[start], places[begin])
                for start, end in pairwise([*starts, len(rows)])
                for begin in range(start, end, GROUP)
            ]
            device = self.memory.device
            ids, at = torch.tensor([tokens], device=device), torch.tensor([places], device=device)
            chosen = torch.tensor(kept, dtype=torch.int64, device=device)
            logits = model(ids, position_ids=at, cache=self, logits_to_keep=chosen).logits[0]
        return logits.float()

    def begin(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        return None  # `read` passes the positions

    def attend(self, layer: int, qkv: Tensor, cu_seqlens: Tensor | None, **settings: Any) -> Tensor:
        out = torch.empty_like(qkv[:, :, 0])  # (1, N, H, D)
        for begin, end, row, place in self._groups:
            cached = self.layers[layer][:, row : row + 1, :, : place + end - begin]  # (2, 1, H, tokens, D)
            cached[:, :, :, place:] = qkv[:, begin:end, 1:].permute(2, 0, 3, 1, 4)
            queries = qkv[:, begin:end, 0].transpose(1, 2)
            out[:, begin:end] = ops.attention(queries, *cached, **settings).transpose(1, 2)
        return out

    def end(self) -> None:
        pass
