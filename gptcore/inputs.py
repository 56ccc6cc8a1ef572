"""Checks of the inputs of GPT.forward and of its heads, and the cu_seqlens, positions and targets derived from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.config import IGNORED, GPTConfig

if TYPE_CHECKING:
    from gptcore.generation.cache import KVCache


def check_one_dtype(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming them, if some weights have another dtype than most."""
    dtypes = [tensor.dtype for tensor in state.values()]
    most = max(dtypes, key=dtypes.count)
    odd = [f"{name} {tensor.dtype}" for name, tensor in state.items() if tensor.dtype != most]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise ValueError(
            f"weights should all be {most}, as most are, not {', '.join(odd[:5])}{more}; model.to({most}) converts them"
        )


def cu_seqlens_of(attention_mask: Tensor) -> Tensor:
    """Return cu_seqlens (3B + 1,) of padded rows (B, T): padding, text, padding in each, possibly of length 0."""
    B, T = attention_mask.shape
    row = torch.arange(B, device=attention_mask.device) * T
    start = row + attention_mask.int().argmax(1)  # the first 1
    end = start + attention_mask.sum(1)
    return F.pad(torch.stack([start, end, row + T], 1).flatten(), (1, 0))


def positions_in(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Return the position of each of the B * T tokens in its document, from 0: (B, T)."""
    token = torch.arange(B * T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[document]).view(B, T)


def targets_of(labels: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the target of each token, (B, T): the label after it, or IGNORED (see `labels` of GPT.forward)."""
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, IGNORED)
        cu_seqlens = cu_seqlens_of(attention_mask)
    if cu_seqlens is not None:
        first = positions_in(cu_seqlens, *labels.shape) == 0  # no token before it in its document
        labels = labels.masked_fill(first, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def check_shapes(
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> None:
    """Raise ValueError or TypeError for shapes and dtypes that do not fit. Reads no values, so never synchronises."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}, expected a tensor (batch, length)")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids should be (batch, length) with a token or more, not {tuple(input_ids.shape)}")
    B, T = input_ids.shape
    for name, tensor in (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids)):
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} should be int64 or int32, not {tensor.dtype}")
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} should have the shape of input_ids {(B, T)}")
    if attention_mask is not None and attention_mask.is_floating_point():
        raise TypeError(f"attention_mask should be bool or integer, not {attention_mask.dtype}")
    if position_ids is not None and tuple(position_ids.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(f"position_ids {tuple(position_ids.shape)} should be {(T,)} or {(B, T)}")
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens both say which tokens belong together; pass one of them")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens is a {type(cu_seqlens).__name__}, expected one tensor of boundaries")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens should be one list of two boundaries or more, not {tuple(cu_seqlens.shape)}")
    past = 0 if cache is None else cache.length
    if cache is not None and (attention_mask is not None or (past > 0 and cu_seqlens is not None)):
        raise ValueError(
            f"the cache holds {past} tokens, in rows without padding: pass neither attention_mask nor, after the first "
            "pass, cu_seqlens"
        )
    if position_ids is None and attention_mask is None and cu_seqlens is None and past + T > config.n_positions:
        raise ValueError(f"sequence of {past + T} tokens, but this model has {config.n_positions} positions")


def check_outputs(
    input_ids: Tensor, labels: Tensor | None, has_cache: bool, return_logits: bool, logits_to_keep: int | Tensor
) -> None:
    """Raise ValueError for a choice of logits and loss that contradicts itself or the input."""
    T = input_ids.shape[1]
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"logits_to_keep is {logits_to_keep.dtype} of shape {tuple(logits_to_keep.shape)}, "
                "expected a number or 1-D int64 or int32 indices"
            )
    elif not 0 <= logits_to_keep <= T:
        raise ValueError(f"logits_to_keep {logits_to_keep} should be between 0 (all) and the {T} tokens of input_ids")
    keeps_all = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0
    if labels is not None and (has_cache or not keeps_all):
        raise ValueError("labels need the logits of the whole sequence: pass no cache, and logits_to_keep=0")
    if labels is None and not return_logits:
        raise ValueError("return_logits=False returns the loss alone, which needs labels")


def check_values(
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor,
) -> None:
    """Raise ValueError for values that do not fit, on the CPU and outside of torch.compile.

    On other devices reading values would synchronise; PyTorch's own assertions stop out-of-range reads there.
    """
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        return
    if attention_mask is not None:
        ones = attention_mask.bool()
        if not torch.equal(ones.to(attention_mask.dtype), attention_mask):
            raise ValueError(f"attention_mask should hold 0 and 1 only, not {int(attention_mask[ones].max())}")
        runs = ones[:, 0].long() + (ones[:, 1:] & ~ones[:, :-1]).sum(1)
        if (runs != 1).any():
            row = int((runs != 1).int().argmax())
            raise ValueError(
                f"row {row} of attention_mask has {int(runs[row])} runs of ones, but a text is one run, with zeros for "
                "padding before and after it; to pack several texts in a row, pass cu_seqlens"
            )
    if cu_seqlens is not None:
        first, last, tokens = int(cu_seqlens[0]), int(cu_seqlens[-1]), input_ids.numel()
        if (first, last) != (0, tokens):
            raise ValueError(f"cu_seqlens should go from 0 to the batch's {tokens} tokens, not from {first} to {last}")
        if (fall := cu_seqlens.diff().min()) < 0:
            raise ValueError(f"cu_seqlens should never fall, but does by {-int(fall)} tokens")
    low, high = (int(value) for value in input_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {config.vocab_size} tokens")
    low, high = (int(value) for value in position_ids.aminmax())
    if low < 0:
        raise ValueError(f"position {low} is before the first, 0")
    if high >= config.n_positions:
        raise ValueError(f"sequence of {high + 1} tokens, but this model has {config.n_positions} positions")
    if labels is not None:
        wrong = labels[((labels < 0) | (labels >= config.vocab_size)) & (labels != IGNORED)]
        if len(wrong) > 0:
            raise ValueError(
                f"label {int(wrong[0])} is neither {IGNORED} nor in the vocabulary of {config.vocab_size} tokens"
            )


# ---- of the heads -------------------------------------------------------------------------------------------------


def label_names(num_labels: Any, id2label: Any) -> list[str]:
    """Return the names of the labels, from 0 on, checked (see TaskModel)."""
    if id2label is None:
        count = 2 if num_labels is None else num_labels
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 2**20:
            raise ValueError(f"num_labels should be a whole number from 1 to {2**20:,}, not {count!r}")
        return [f"LABEL_{i}" for i in range(count)]
    if isinstance(id2label, Mapping):
        names = {str(key): name for key, name in id2label.items()}
        expected = [str(i) for i in range(len(names))]
        if wrong := sorted(names.keys() - set(expected)):
            raise ValueError(f"id2label has the key {wrong[0]!r}, expected 0 to {len(names) - 1}")
        id2label = [names[i] for i in expected]
    labels = list(id2label)
    if wrong := [name for name in labels if not isinstance(name, str)]:
        raise TypeError(f"id2label has the name {wrong[0]!r}, expected a str")
    if not labels:
        raise ValueError("id2label is empty; a head needs a label")
    if twice := [name for i, name in enumerate(labels) if name in labels[:i]]:
        raise ValueError(f"id2label has the name {twice[0]!r} twice")
    if num_labels not in (None, len(labels)):
        raise ValueError(f"num_labels is {num_labels}, but id2label has {len(labels)} names")
    return labels


def readable(tensor: Tensor) -> bool:
    """Return whether values can be checked: on other devices and in a graph that would synchronise."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(name: str, values: Tensor, end: int, ignored: int | None = IGNORED) -> None:
    """Raise TypeError or ValueError unless the values are integers from 0 to end - 1, or `ignored`."""
    if values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} should be int64 or int32, not {values.dtype}")
    if readable(values):
        wrong = values[((values < 0) | (values >= end)) & (values != ignored if ignored is not None else True)]
        if len(wrong):
            also = "" if ignored is None else f", or {ignored} for none"
            raise ValueError(f"{name} {int(wrong[0])} should be from 0 to {end - 1}{also}")
