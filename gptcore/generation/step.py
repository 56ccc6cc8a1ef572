"""A decoding step, or the reading of prompts, through the whole model in one native call, with the bits of GPT.forward.

At batch 1 a small model's kernels take less time than the Python code between them. The call computes what the classes
that are registered here compute, in eval mode and without gradients. Whatever would be noticed in Python is left to
GPT.forward: hooks, other classes or methods, autocast, another backend, tensors that are not plain or not on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from gptcore import _C
from gptcore.generation.cache import KVCache, new_memory
from gptcore.ops import native, registry

if TYPE_CHECKING:
    from gptcore.model import GPT

# What _C.decode takes as `layers`: scale and window of attention, eps of both norms, whether GELU has the tanh form.
Layer = tuple[float, int, float, float, bool]

_forwards: dict[type[nn.Module], Callable[..., Any]] = {}


def register(*kinds: type[nn.Module]) -> None:
    """Declare classes of modules whose `forward`, as it is now, the native step computes."""
    _forwards.update({kind: kind.forward for kind in kinds})


register(nn.Dropout, nn.Embedding, nn.ModuleList)


def next_logits(model: GPT, tokens: list[int], cache: KVCache) -> Tensor:
    """Return logits (B, V) after one more token in each row of the cache."""
    rows = list(range(len(tokens)))
    if cache.length < cache.capacity:
        logits = native_logits(model, tokens, cache.layers, rows, cache.lengths, rows)
        if logits is not None:
            cache.set_lengths([length + 1 for length in cache.lengths])
            return logits
    ids = torch.tensor(tokens, device=cache.layers[0].device)[:, None]
    return model(ids, cache=cache).logits[:, -1]


def first_logits(model: GPT, texts: list[list[int]], cache: KVCache) -> Tensor | None:
    """Fill an empty cache; return the logits (B, V) after each text, or None where GPT.forward has to compute them."""
    if next(model.parameters()).device.type != "cpu":
        return None
    memory, lengths = list(new_memory(model, len(texts), cache.capacity)), list(map(len, texts))
    tokens = [token for text in texts for token in text]
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    places = [place for length in lengths for place in range(length)]
    kept = [end - 1 for end in itertools.accumulate(lengths)]
    logits = native_logits(model, tokens, memory, rows, places, kept)
    if logits is not None:
        cache.layers = memory
        cache.set_lengths(lengths)
    return logits


def native_logits(
    model: GPT, tokens: list[int], caches: list[Tensor], rows: list[int], places: list[int], kept: list[int]
) -> Tensor | None:
    """Return the logits (kept, V) of the native step, or None without any effect where GPT.forward has to compute them.

    caches: keys and values of each layer, (2, rows, H, capacity, D). They get those of the tokens.
    rows, places: of each token in the caches; it attends to all places of its row up to its own.
    kept: indices of the tokens whose logits are wanted.
    """
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or registry.in_use() not in (None, "cpu")
        or registry.is_transformed()
        or (found := _describe(model, caches)) is None
    ):
        return None
    weights, layers, embeddings, positions = found
    if native.is_watched(embeddings, positions, *weights):
        return None
    try:
        if embeddings is None:
            ids, at = (torch.tensor(values, device="cpu")[:, None] for values in (tokens, places))
            tokens, embeddings = list(range(len(tokens))), model._embed(ids, at)[:, 0]
        logits = embeddings.new_empty(len(kept), len(weights[-1]))
        final_eps = None if model.ln_f is None else model.ln_f.eps
        _C.decode(
            tokens, embeddings, positions, weights, caches, rows, places, kept, layers, final_eps, logits,
            torch.get_num_threads(),
        )  # fmt: skip
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None  # nothing was written: GPT.forward computes it, or says what is wrong
    return logits


def _describe(
    model: GPT, caches: list[Tensor]
) -> tuple[list[Tensor], list[Layer], Tensor | None, Tensor | None] | None:
    """Return weights, numbers of the layers, embeddings and positions; None if Python could notice the native step.

    Embeddings and positions are None where only GPT._embed computes their sum.
    Read anew for every step: between two tokens of a stream anything may change.
    """
    if torch_module._has_any_global_hook() or any(kind.forward is not known for kind, known in _forwards.items()):
        return None
    pre_norm = model.ln_f is not None
    modules: list[nn.Module] = [model, model.wte, model.drop, model.h]
    modules += [module for module in (model.wpe, model.ln_f) if module is not None]
    weights: list[Tensor] = []
    layers: list[Layer] = []
    heads = set()
    try:
        block: Any
        for block in model.h._modules.values():
            parts = block._modules  # a module's attributes take longer
            attn, mlp, ln_1, ln_2 = parts["attn"], parts["mlp"], parts["ln_1"], parts["ln_2"]
            a, m = attn._modules, mlp._modules
            leaves = (ln_1, a["c_attn"], a["c_proj"], ln_2, m["c_fc"], m["c_proj"])
            modules += (block, attn, a["resid_dropout"], mlp, m["resid_dropout"], *leaves)
            for leaf in leaves:
                weights += (_weight_of(leaf), leaf._parameters["bias"])
            left, right = (-1, 0) if attn.window is None else attn.window
            if block.post_norm == pre_norm or attn.layer != len(layers) or right != 0:
                return None
            heads.add(attn.n_head)
            layers.append((attn.scale, left, ln_1.eps, ln_2.eps, mlp.gelu_form == "tanh"))
        wpe: Any = model.wpe
        last: Any = model.ln_f
        embeddings = positions = None
        if wpe is not None and wpe.max_norm is None and (embeddings := model.wte._parameters.get("weight")) is not None:
            positions = wpe._parameters["weight"]
        if pre_norm:
            weights += (last._parameters["weight"], last._parameters["bias"])
        head: Any = model.wte if model.lm_head is None else model.lm_head
        weights.append(_weight_of(head))
    except KeyError:  # a module or weight was removed, or is computed
        return None
    for module in modules:
        state = module.__dict__
        if (
            type(module) not in _forwards
            or state["training"]
            or state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
            or "forward" in state
            or "_compiled_call_impl" in state
        ):
            return None
    if heads != {caches[0].shape[2]} or (type(head) is not nn.Linear and type(head) not in _forwards):
        return None
    return weights, layers, embeddings, positions


def _weight_of(module: Any) -> Tensor:
    """Return the weight, a parameter or, in blocks, a buffer."""
    found: Tensor | None = module._parameters.get("weight")
    return module._buffers["weight"] if found is None else found
