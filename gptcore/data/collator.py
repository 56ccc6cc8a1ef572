"""Windows of tokens to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gptcore.config import IGNORED
from gptcore.text.tokenizer import Tokenizer

Feature = torch.Tensor | Sequence[int] | Mapping[str, Any]
_KEYS = {"input_ids", "labels", "document_starts", "attention_mask"}


class DataCollatorForLanguageModeling:
    """Stack windows into a batch for a model that predicts each next token, and shifts the labels itself.

    Takes a list of id tensors, id lists, or dicts such as a tokenizer returns for one text, with "input_ids" and
    maybe "attention_mask" (1 on tokens, 0 on padding), "labels" (of the same length, -100 where none counts; the ids if
    not given) or "document_starts". Returns int64 tensors:

        input_ids       (batch, length), shorter rows padded on the right
        labels          (batch, length), the same ids or the labels given; -100 on padding and on the first token of
                        each document, which no earlier token predicts
        attention_mask  (batch, length), 1 on tokens and 0 on padding; only if there is padding, and no cu_seqlens
        cu_seqlens      (segments + 1,), boundaries in the flattened batch x length: 0, the end of each row, the start
                        of each document and of padding; only if the windows carry document_starts

    Padding is what the attention_mask of a window says and what fills up a shorter row. It never follows from the ids:
    an end-of-text token in the text counts, though it may be the padding token.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, mlm: bool = False) -> None:
        """`tokenizer` gives the padding id (without one, 0: padding never counts). Raises ValueError for mlm=True."""
        if mlm:
            raise ValueError("mlm=True is for models like BERT; a GPT predicts the next token: give mlm=False")
        self.tokenizer = tokenizer
        self.pad_token_id = 0 if tokenizer is None else tokenizer.pad_token_id or 0

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        if isinstance(features, Mapping):
            raise TypeError("a batch is a list of windows, one for each text, not a dict of lists")
        if len(features) == 0:
            raise ValueError("a batch needs at least one window, but the list is empty")
        windows = [dict(f) if isinstance(f, Mapping) else {"input_ids": f} for f in features]
        keys = windows[0].keys() - {"attention_mask"}
        if any(w.keys() - {"attention_mask"} != keys for w in windows) or not {"input_ids"} <= keys <= _KEYS:
            found = sorted({tuple(sorted(w)) for w in windows})
            raise ValueError(f"each window has input_ids, and all or none labels or document_starts, but not {found}")
        rows = [_ids(w["input_ids"]) for w in windows]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_token_id, device="cpu")
        labels = torch.full_like(input_ids, IGNORED)
        attention_mask = torch.zeros_like(input_ids)
        boundaries = {0}
        for r, row in enumerate(rows):
            input_ids[r, : len(row)] = row
            labels[r, : len(row)] = _beside(windows[r], "labels", row, row)
            attention_mask[r, : len(row)] = _beside(windows[r], "attention_mask", row, torch.ones_like(row))
            boundaries |= {r * length + len(row), (r + 1) * length}
            if "document_starts" in keys:
                starts = torch.as_tensor(windows[r]["document_starts"], dtype=torch.int64, device="cpu")
                if ((starts < 0) | (starts >= len(row))).any():
                    raise ValueError(f"document_starts must be from 0 to {len(row) - 1}, but are {starts.tolist()}")
                if not attention_mask[r, : len(row)].all():
                    raise ValueError("a window with document_starts holds no padding, but its attention_mask has zeros")
                labels[r, starts] = IGNORED
                boundaries |= set((r * length + starts).tolist())
        labels[attention_mask == 0] = IGNORED
        batch = {"input_ids": input_ids, "labels": labels}
        if "document_starts" in keys:
            batch["cu_seqlens"] = torch.tensor(sorted(boundaries), device="cpu")
        elif not attention_mask.all():
            batch["attention_mask"] = attention_mask
        return batch


def _beside(window: Mapping[str, Any], key: str, ids: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    values = _ids(window.get(key, default), key)
    if len(values) != len(ids):
        raise ValueError(f"a window has {len(ids)} input_ids and {len(values)} {key}, expected as many")
    return values


def _ids(row: Any, key: str = "input_ids") -> torch.Tensor:
    ids = torch.as_tensor(row, device="cpu")
    if ids.dim() != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{key} must be a row of token ids, but are {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.to(torch.int64)
