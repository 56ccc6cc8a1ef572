"""The keys and values of the tokens so far, for rows of text of any lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore import ops
from gptcore.ops.documents import assume_valid

if TYPE_CHECKING:
    from gptcore.model import GPT


GROUP = 8  # queries of a row that attend together: as many as the decoding kernel takes


def new_memory(model: GPT, rows: int, capacity: int) -> Tensor:
    """Return zeros for the keys and values of all layers, (layers, 2, rows, H, capacity, D)."""
    config, like = model.config, next(model.parameters())
    return like.new_zeros(config.n_layer, 2, rows, config.n_head, capacity, config.head_dim)


class KVCache:
    """Keys and values of every layer. Each row of text has its own length and starts at position 0, without padding.

    The first forward pass with a cache fills it: each row of the batch, or each document of cu_seqlens, becomes a row.
    Every later pass adds T tokens to each row. `extend` takes in the rows of another cache; `drop` removes a row.

    On CPUs the first pass attends as decoding does, at most GROUP queries at a time, so that a text has the same bits
    however it is divided into passes.

    A layer has one tensor (2, rows, H, capacity, D), in the dtype and on the device of its first keys. Free space holds
    zeros: kernels are slow where masked values are NaN.
    """

    def __init__(self, capacity: int, documents: list[int] | None = None) -> None:
        """documents: the lengths that cu_seqlens of the first pass has; without them they are read from the device."""
        self.capacity = capacity  # tokens that a row has room for
        self._documents = documents
        self.lengths: list[int] = []  # tokens of each row
        self.layers: list[Tensor] = []
        self._positions: Tensor | None = None  # what positions() returns, if it was needed
        self._added: list[int] = []  # tokens that this forward pass adds to each row
        self._new_positions = torch.empty(0, dtype=torch.int64, device="cpu")  # of these tokens
        self._ragged: Ragged | None = None  # set in a pass over rows of different lengths
        self._groups: list[tuple[int, int, int, int]] = []  # first token, past the last, row, place of the first

    @property
    def length(self) -> int:
        """Return the number of tokens of the longest row; 0 without rows."""
        return max(self.lengths, default=0)

    def positions(self) -> Tensor:
        """Return the lengths of the rows, the positions of their next tokens, on the device of the keys."""
        if self._positions is None:
            self._positions = torch.tensor(self.lengths, dtype=torch.int64, device=self.layers[0].device)
        return self._positions

    def begin(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """Prepare a pass over input_ids (B, T). Returns the tokens' positions (B, T), or None where rows start at 0.

        Raises ValueError where the tokens do not match the rows or do not fit.
        """
        B, T = input_ids.shape
        if self.lengths and len(self.lengths) != B:
            raise ValueError(f"input_ids has {B} rows, but the cache holds {len(self.lengths)}")
        self._added = [T] * B if cu_seqlens is None else self._documents or cu_seqlens.diff().tolist()
        if self.length + max(self._added) > self.capacity:
            raise ValueError(
                f"{self.length} + {max(self._added)} tokens do not fit into a KV cache of {self.capacity} tokens a row"
            )
        if not self.lengths:
            self._group((row, 0, count) for row, count in enumerate(self._added))
            return None
        self._new_positions, self._ragged = self.positions()[:, None] + torch.arange(T, device=input_ids.device), None
        return self._new_positions

    def attend(self, layer: int, qkv: Tensor, cu_seqlens: Tensor | None, **settings: Any) -> Tensor:
        """Write the keys and values in qkv (B, T, 3, H, D), and attend from its queries to all keys of their rows.

        cu_seqlens: documents of the first pass. settings: those of ops.attention. Returns (B, T, H, D).
        """
        B, T, _, H, D = qkv.shape
        new = qkv[:, :, 1:]  # keys and values: (B, T, 2, H, D)
        if not self.lengths:
            if layer == len(self.layers):
                self.layers.append(qkv.new_zeros(2, len(self._added), H, self.capacity, D))
            if qkv.device.type == "cpu" and not torch.is_grad_enabled():
                return self._attend_in_groups(layer, qkv.reshape(1, B * T, 3, H, D), settings).view(B, T, H, D)
            texts = new if cu_seqlens is None else new.flatten(0, 1).split(self._added)
            for row, text in enumerate(texts):
                self.layers[layer][:, row, :, : len(text)] = text.permute(1, 2, 0, 3)
            return ops.attention_qkvpacked(qkv, cu_seqlens=cu_seqlens, **settings)
        cached, end, pair = self.layers[layer][:, :B], self.length + T, None
        if min(self.lengths) == self.length:
            cached[:, :, :, self.length : end] = new.permute(2, 0, 3, 1, 4)
        else:
            self._ragged = self._ragged or Ragged(self._new_positions, end)  # once for all layers
            cached[:, self._ragged.rows, :, self._ragged.positions] = new
            pair = self._ragged.cu_seqlens_q, self._ragged.cu_seqlens_k
        keys, values = cached[:, :, :, :end].unbind(0)  # each (B, H, tokens, D), strided: never copied
        queries = qkv[:, :, 0].transpose(1, 2)
        return ops.attention(queries, keys, values, cu_seqlens=pair, **settings).transpose(1, 2)

    def _group(self, texts: Iterable[tuple[int, int, int]]) -> None:
        """Divide adjacent tokens into groups, given row, place of the first token and number of tokens of each text."""
        self._groups, begin = [], 0
        for row, place, count in texts:
            ends = [min(done + GROUP, count) for done in range(0, count, GROUP)]
            starts = [0, *ends]
            self._groups += [(begin + a, begin + b, row, place + a) for a, b in zip(starts, ends, strict=False)]
            begin += count

    def _attend_in_groups(self, layer: int, qkv: Tensor, settings: dict[str, Any]) -> Tensor:
        """Write the keys and values in qkv (1, N, 3, H, D), and attend from its queries; returns (1, N, H, D)."""
        out = torch.empty_like(qkv[:, :, 0])
        for begin, end, row, place in self._groups:
            cached = self.layers[layer][:, row : row + 1, :, : place + end - begin]  # (2, 1, H, tokens, D)
            cached[:, :, :, place:] = qkv[:, begin:end, 1:].permute(2, 0, 3, 1, 4)
            queries = qkv[:, begin:end, 0].transpose(1, 2)
            out[:, begin:end] = ops.attention(queries, *cached, **settings).transpose(1, 2)
        return out

    def end(self) -> None:
        """Count the tokens of a pass, after its last layer."""
        if self.lengths:
            self._positions = self.positions() + self._added[0]
            self.lengths = [length + added for length, added in zip(self.lengths, self._added, strict=True)]
        else:
            self.set_lengths(self._added)

    def extend(self, other: KVCache) -> None:
        """Append copies of the rows of another cache of the same model."""
        used, rows = len(self.lengths), len(self.lengths) + len(other.lengths)
        capacity = max(self.capacity, other.length)
        for layer, theirs in enumerate(other.layers):
            ours = self.layers[layer] if self.layers else theirs[:, :0]
            if ours.shape[1] < rows or ours.shape[3] < capacity:  # twice the rows, so that copies stay rare
                larger = theirs.new_zeros(2, max(rows, 2 * used), theirs.shape[2], capacity, theirs.shape[4])
                larger[:, :used, :, : self.length] = ours[:, :used, :, : self.length]
                ours = larger
            ours[:, used:rows, :, : other.length] = theirs[:, : len(other.lengths), :, : other.length]
            self.layers[layer : layer + 1] = [ours]
        self.capacity = capacity
        self.set_lengths([*self.lengths, *other.lengths])

    def drop(self, row: int) -> None:
        """Remove a row. The last row takes its place."""
        last, gone = len(self.lengths) - 1, self.lengths[row]
        length = self.lengths[row] = self.lengths[last]
        for layer in self.layers:
            if row < last:
                layer[:, row, :, :length] = layer[:, last, :, :length]
                layer[:, row, :, length:gone] = 0
            layer[:, last, :, :length] = 0
        del self.lengths[last]
        if not self.lengths:
            self.layers = []
        self.set_lengths(self.lengths)

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many tokens each row has."""
        self.lengths, self._positions = lengths, None


class Ragged:
    """Where a pass over B rows of different lengths writes, and which keys its T queries a row attend to."""

    def __init__(self, positions: Tensor, longest: int) -> None:
        B, T = positions.shape
        row = torch.arange(B, device=positions.device)
        self.rows, self.positions = row[:, None], positions  # (B, 1) and (B, T)
        # Two segments a row: its tokens with its queries, then its free space up to the longest row, without a query
        end_q, end_k = (row + 1) * T, (row + 1) * longest
        filled = row * longest + positions[:, -1] + 1
        self.cu_seqlens_q = F.pad(torch.stack([end_q, end_q], 1).flatten(), (1, 0))
        self.cu_seqlens_k = F.pad(torch.stack([filled, end_k], 1).flatten(), (1, 0))
        assume_valid(self.cu_seqlens_q, self.cu_seqlens_k, B, T, longest)  # a check would wait for the device
