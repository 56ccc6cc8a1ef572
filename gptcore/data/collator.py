"""Examples to a batch: windows of tokens for a language model, texts with labels for the heads of gptcore.heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
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


class DataCollatorForTasks:
    """Pad texts, and stack their labels, to a batch for a head for a task (gptcore.heads).

    Takes a list of dicts with "input_ids", the ids of one text, or a list of texts (the choices of a question, the
    orders of a pair), and other entries, the same in all of them. Returns a dict of tensors:

        input_ids, attention_mask    (batch, length), or (batch, texts, length), padded on the right; int64
        labels                       if they are integers, one for each token: as input_ids, -100 on padding
        any other entry              stacked: int64 or float32, (batch, ...)
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` gives the padding id (without one, 0: padding never counts)."""
        self.pad_token_id = 0 if tokenizer is None else tokenizer.pad_token_id or 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if isinstance(features, Mapping) or len(features) == 0:
            raise ValueError("a batch is a list of one example or more, each a dict with input_ids")
        keys = features[0].keys() | {"input_ids"}
        if odd := next((sorted(f) for f in features if f.keys() != keys), None):
            raise ValueError(f"every example should have {sorted(keys)}, but one has {odd}")
        texts = [_texts(f["input_ids"], "input_ids") for f in features]
        if len({len(rows) for rows in texts}) > 1:
            raise ValueError(f"every example should have as many texts, but they have {[len(rows) for rows in texts]}")
        length = max(len(row) for rows in texts for row in rows)
        nested = _is_nested(features[0]["input_ids"])
        shape = (len(texts), len(texts[0]), length) if nested else (len(texts), length)

        def pad(key: str, value: int, default: int = 0) -> torch.Tensor:
            padded = torch.full((len(texts) * len(texts[0]), length), value, device="cpu")
            given = [
                _texts(f[key], key) if key in f else [torch.full_like(row, default) for row in rows]
                for f, rows in zip(features, texts, strict=True)
            ]
            pairs = [pair for rows, beside in zip(texts, given, strict=True) for pair in zip(rows, beside, strict=True)]
            for to, (row, beside) in zip(padded, pairs, strict=True):
                if len(row) != len(beside):
                    raise ValueError(f"a text has {len(row)} input_ids and {len(beside)} {key}, expected as many")
                to[: len(row)] = beside
            return padded.view(shape)

        batch = {"input_ids": pad("input_ids", self.pad_token_id), "attention_mask": pad("attention_mask", 0, 1)}
        for key in sorted(keys - batch.keys()):
            values = [f[key] for f in features]
            if key == "labels" and _holds_integers(values[0]):
                batch[key] = pad(key, IGNORED)
                continue
            tensors = [torch.as_tensor(value, device="cpu") for value in values]
            if len({tensor.shape for tensor in tensors}) > 1:
                raise ValueError(f"{key} of the examples have the shapes {[tuple(t.shape) for t in tensors]}")
            stacked = torch.stack(tensors)
            batch[key] = stacked.float() if stacked.is_floating_point() else stacked.long()
        return batch


def _is_nested(value: Any) -> bool:
    return value.dim() > 1 if isinstance(value, torch.Tensor) else len(value) > 0 and hasattr(value[0], "__len__")


def _texts(value: Any, key: str) -> list[torch.Tensor]:
    return [_ids(row, key) for row in value] if _is_nested(value) else [_ids(value, key)]


def _holds_integers(value: Any) -> bool:
    """Return whether this is a row of integers, or a list of such rows."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and (isinstance(value[0], Integral) or _holds_integers(value[0]))
    tensor = torch.as_tensor(value)
    return tensor.dim() > 0 and not tensor.is_floating_point()


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
