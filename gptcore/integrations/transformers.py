"""gptcore's attention, layer norm and GELU in models of Hugging Face's transformers.

`apply(model)` replaces all three in a GPT-2, in place, and `restore(model)` undoes it. `register()` adds the
attention under the name "gptcore", for any causal model: from_pretrained(..., attn_implementation="gptcore").

ops.attention takes no dense mask, so a mask is converted to segments once per forward pass (see `segments_of`).
Padding before a text attends to no key, and its output is 0, as with transformers' "sdpa" ("eager" returns the mean of
all values there). Padding after a text attends to the text; PyTorch's attention computes these few queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore import ops

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, activations
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        'gptcore.integrations.transformers needs transformers 5: pip install "gptcore[transformers]"'
    ) from error

NAME = "gptcore"
_BEFORE = "_gptcore_replaced_attention"  # attribute of a model that `apply` changed: the attention that it had
_HOOK = "_gptcore_hook"
Segments = tuple[Tensor, Tensor]
Reading = tuple[Segments, tuple[int, int] | None, Tensor | None]


def register() -> None:
    """Make attn_implementation="gptcore" known to transformers. Repeated calls change nothing.

    transformers' GPT-2 silently drops output_attentions=True unless its attention is "eager"; `apply` refuses it.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


def apply(model: PreTrainedModel) -> PreTrainedModel:
    """Replace attention, layer norm and GELU in a GPT-2 of transformers, in place; returns the model.

    Parameters, buffers and hooks do not change. Afterwards output_attentions=True raises ValueError, since our kernels
    do not materialise the attention weights.

    Raises TypeError for a model that is not a GPT-2, and ValueError if its activation is not a GELU or apply was called
    on it before.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not isinstance(model, PreTrainedModel) or kind != "gpt2":
        raise TypeError(
            f"apply is for GPT-2 models of transformers, not for {kind}; other causal models take our attention by "
            "register() and attn_implementation='gptcore'"
        )
    if hasattr(model, _BEFORE):
        raise ValueError("this model has gptcore's operations already")
    if model.config.activation_function not in _ACTIVATIONS:
        raise ValueError(
            f"activation_function {model.config.activation_function!r} is not supported; "
            f"it should be one of {', '.join(_ACTIVATIONS)}"
        )
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    setattr(model, _BEFORE, before)
    setattr(model, _HOOK, model.base_model.register_forward_pre_hook(_refuse_weights, with_kwargs=True))
    _exchange(model, _OURS)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `apply`; returns the model. Raises ValueError for a model that it was not applied to."""
    if not hasattr(model, _BEFORE):
        raise ValueError("gptcore's operations are not in this model: there is nothing to restore")
    model.set_attn_implementation(getattr(model, _BEFORE))
    getattr(model, _HOOK).remove()
    delattr(model, _BEFORE)
    delattr(model, _HOOK)
    _exchange(model, {ours: theirs for theirs, ours in _OURS.items()})
    return model


def _refuse_weights(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError for output_attentions, which transformers' GPT-2 would silently drop."""
    if kwargs.get("output_attentions") or model.config.output_attentions:
        raise ValueError("gptcore's attention has no output_attentions: restore(model), and use 'eager' for this")


def _exchange(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


# ---- layer norm and GELU: subclasses with the same state -------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps)


class NewGELUActivation(activations.NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate="tanh")


class GELUTanh(activations.GELUTanh):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate="tanh")


class GELUActivation(activations.GELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate="none")


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    activations.NewGELUActivation: NewGELUActivation,
    activations.GELUTanh: GELUTanh,
    activations.GELUActivation: GELUActivation,
}
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "gelu_python", "gelu_python_tanh")


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: (B, H, Q, D), keys and values (B, H_kv, K, D) -> (B, Q, H, D).

    Raises ValueError for what ops.attention lacks: masks that `segments_of` refuses, attention weights, softcap, sinks,
    biases.
    """
    for name in ("softcap", "s_aux", "position_bias", "head_mask", "output_attentions", "cache"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"gptcore's attention has no {name}: use attn_implementation='eager' for this")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = segments = after = None
    if attention_mask is not None:
        segments, window, after = _read_once(attention_mask, causal, query.shape[0], query.shape[2], key.shape[2])
    elif causal and query.shape[2] not in (1, key.shape[2]):
        raise ValueError(f"{query.shape[2]} queries for {key.shape[2]} keys need a mask that says how they are aligned")
    out = ops.attention(
        query, key, value, causal=causal, scale=scaling, window=window, cu_seqlens=segments, dropout_p=dropout
    )
    if after is not None and attention_mask is not None:
        out, seen = out.clone(), attention_mask == 0 if attention_mask.is_floating_point() else attention_mask.bool()
        for row in after.any(1).nonzero().flatten().tolist():
            mask = seen.expand(len(query), -1, -1, -1)[row, :, after[row]]
            out[row, :, after[row]] = F.scaled_dot_product_attention(
                query[row, :, after[row]], key[row], value[row], mask, dropout, scale=scaling, enable_gqa=True
            )
    return out.transpose(1, 2), None


def make_mask(**settings: Any) -> Tensor | None:
    """Return transformers' mask for SDPA, bool (B, 1, Q, K), or None if it is causal with as many queries as keys."""
    square = settings["q_length"] == settings["kv_length"]
    mask: Tensor | None = sdpa_mask(
        **{**settings, "allow_is_causal_skip": square and settings.get("allow_is_causal_skip", True)}
    )
    return mask


def _read_once(mask: Tensor, causal: bool, B: int, Q: int, K: int) -> Reading:
    """Return `segments_of`, cached on the mask, since all layers of a forward pass get the same one."""
    kept = getattr(mask, "_gptcore_segments", None)
    if kept is None or kept[0] != (causal, B, Q, K, mask._version):
        if mask.dim() != 4 or mask.shape[-2:] != (Q, K):
            raise ValueError(f"attention mask of shape {tuple(mask.shape)}, expected ({B}, 1, {Q}, {K})")
        kept = ((causal, B, Q, K, mask._version), segments_of(mask.expand(B, -1, Q, K), causal))
        mask._gptcore_segments = kept  # type: ignore[attr-defined]
    result: Reading = kept[1]
    return result


def segments_of(mask: Tensor, causal: bool) -> Reading:
    """Convert a mask to arguments of ops.attention: ((cu_seqlens_q, cu_seqlens_k), window, after).

    mask: (B, H, Q, K), bool with True where a query attends to a key; or float with 0 for that, and minus infinity or
    the lowest number of its dtype for all else.

    A causal mask can describe packed documents, padding between and around them, and a sliding window. A token is
    padding if no query attends to its key. Without causal, all queries of a row attend to the same contiguous keys.
    `after` marks the queries (B, Q) of padding that attends to the text before it, or is None; the segments leave these
    queries out.

    Raises ValueError for any other mask.
    """
    if mask.is_floating_point():
        seen = mask == 0
        if ((mask > torch.finfo(mask.dtype).min / 2) & ~seen).any():
            raise ValueError(
                "gptcore's attention has no additive bias, but the mask holds other values than 0 and the lowest"
            )
    else:
        seen = mask.bool()
    if seen.shape[1] > 1 and not torch.equal(seen, seen[:, :1].expand_as(seen)):
        raise ValueError("gptcore's attention needs the same mask in all heads, but this one differs between heads")
    seen = seen[:, 0]  # (B, Q, K)
    B, Q, K = seen.shape
    index = torch.arange(K, device=mask.device)
    count = seen.sum(-1)  # (B, Q)
    low = torch.where(seen, index, K).amin(-1)  # the first key attended to, or K
    high = torch.where(seen, index, -1).amax(-1)  # the last, or -1
    if ((high - low + 1 != count) & (count > 0)).any():
        raise _refused("the keys that a query attends to are not contiguous", (high - low + 1 != count) & (count > 0))
    query = torch.arange(Q, device=mask.device)
    if causal:
        # The last key of a query that is not padding is its own, at the same distance in all of the row
        distance = torch.where(count > 0, high - query, -Q).amax(-1, keepdim=True)  # (B, 1)
        real = (count > 0) & (high - query == distance)
        own = query + distance  # (B, Q)
        seen_by_some = seen.any(1).gather(1, own.clamp(0, K - 1)) & (own >= 0) & (own < K)
        if (wrong := ~real & (seen_by_some | ((count > 0) & (own >= K)))).any():
            raise _refused("the last key that a query attends to is not its own, though others attend to that", wrong)
        width = max(1, int(count[real].max())) if real.any() else 1
        goes_on = torch.zeros_like(real)
        goes_on[:, 1:] = (
            real[:, 1:] & real[:, :-1] & (low[:, 1:] == torch.maximum(low[:, :-1], high[:, 1:] - width + 1))
        )
    else:
        wrong = (low != low[:, :1]) | (high != high[:, :1])
        if wrong.any():
            raise _refused("without causal, queries of one row attend to different keys", wrong)
        real, goes_on, width = count > 0, (count > 0) & (query > 0), K
    cu_seqlens_q, cu_seqlens_k = [0], [0]

    def segment(to_q: int, to_k: int) -> None:
        if (to_q, to_k) != (cu_seqlens_q[-1], cu_seqlens_k[-1]):
            cu_seqlens_q.append(to_q)
            cu_seqlens_k.append(to_k)

    longest = 0
    for b in range(B):
        starts = (real[b] & ~goes_on[b]).nonzero().flatten().tolist()
        for start in starts:
            end = start + 1
            ends = (~goes_on[b, end:]).nonzero()
            end = end + int(ends[0]) if len(ends) else Q
            first, last = int(low[b, start]), int(high[b, end - 1]) + 1
            if b * K + first < cu_seqlens_k[-1]:
                raise _refused("documents share keys", real & (query == start) & (torch.arange(B)[:, None] == b))
            segment(b * Q + start, cu_seqlens_k[-1])  # padding attends to no key
            segment(cu_seqlens_q[-1], b * K + first)  # no query attends to padding
            segment(b * Q + end, b * K + last)
            longest = max(longest, last - first)
        segment((b + 1) * Q, cu_seqlens_k[-1])
        segment(cu_seqlens_q[-1], (b + 1) * K)
    segments = torch.tensor(cu_seqlens_q, device=mask.device), torch.tensor(cu_seqlens_k, device=mask.device)
    window = (width - 1, 0) if causal and width < longest else None
    after = (count > 0) & ~real
    return segments, window, after if after.any() else None


def _refused(why: str, where: Tensor) -> ValueError:
    row, query = (int(i) for i in where.nonzero()[0])
    return ValueError(
        f"gptcore's attention does not support this mask: {why} (first in row {row}, query {query}). It supports "
        "causal masks of documents with padding and a sliding window; for others use attn_implementation='sdpa'"
    )
