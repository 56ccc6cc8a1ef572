"""GPT, after OpenAI's GPT-2 (Radford et al. 2019), on gptcore's kernels.

Parameters have the names of the published weights, and the computation their order: wte wpe h.N.ln_1 attn.c_attn
attn.c_proj ln_2 mlp.c_fc mlp.c_proj ln_f lm_head. Settings of GPTConfig make the other members of the family: GPT-1
(Radford et al. 2018) normalises after each addition; GPT-3 (Brown et al. 2020) has banded attention in odd layers.

Shapes: B batch, T tokens, C = n_embd, H heads of D dimensions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore import generation, ops
from gptcore.config import GELU_FORMS, IGNORED, GPTConfig
from gptcore.generation import KVCache
from gptcore.hf import pretrained

Segments = Tensor | tuple[Tensor, Tensor]  # cu_seqlens of ops.attention


class GPTOutput(NamedTuple):
    """What a forward pass returns; `logits, loss = model(...)` works too."""

    logits: Tensor  # (B, T, V), or fewer tokens with logits_to_keep
    loss: Tensor | None  # (), float32; None without labels


class Linear(nn.Linear):
    """torch.nn.Linear through ops.linear."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Layer norm of x plus what is still to be added to it, in one kernel: (norm(x + update), x + update)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if update is None:
            return ops.layer_norm(x, self.weight, self.bias, eps=self.eps), x
        return ops.layer_norm(update, self.weight, self.bias, eps=self.eps, residual=x)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attn_pdrop = config.attn_pdrop
        self.n_head, self.layer = config.n_head, layer
        self.scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        # GPT-3 alternates dense and locally banded layers (section 2.1); a query is one of the keys that it sees
        self.window: tuple[int, int] | None = None
        if config.attention_window is not None and layer % 2 == 1:
            self.window = (config.attention_window - 1, 0)

    def forward(self, x: Tensor, segments: Segments | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        dropout_p = self.attn_pdrop if self.training else 0.0
        settings: Any = {"scale": self.scale, "window": self.window, "cu_seqlens": segments, "dropout_p": dropout_p}
        if cache is None:
            y = ops.attention_qkvpacked(qkv, **settings)  # (B, T, H, D)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D), strided: never copied
            k, v = cache.append(self.layer, k, v)  # (B, H, tokens so far, D)
            y = ops.attention(q, k, v, **settings).transpose(1, 2)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))  # heads side by side


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        n_inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner)
        self.c_proj = Linear(n_inner, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.gelu_form = GELU_FORMS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.resid_dropout(self.c_proj(ops.gelu(self.c_fc(x), approximate=self.gelu_form)))


class Block(nn.Module):
    """Attention, then MLP. Takes the residual stream and what is still to be added to it, and returns the same two.

    So each addition is done by the layer norm that follows it, which reads the stream anyway.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.post_norm = config.norm_position == "post"

    def forward(
        self, x: Tensor, update: Tensor | None, segments: Segments | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.post_norm:
            x, _ = self.ln_1(x, self.attn(x, segments, cache))
            x, _ = self.ln_2(x, self.mlp(x))
            return x, None
        y, x = self.ln_1(x, update)
        y, x = self.ln_2(x, self.attn(y, segments, cache))
        return x, self.mlp(y)


class GPT(nn.Module):
    """A GPT language model with freshly initialised weights, drawn from PyTorch's global generator.

    The same torch.manual_seed gives the same weights. Made on the meta device it has none: to_empty, then init_weights.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position_embedding == "learned"
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if learned else None
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config) if config.norm_position == "pre" else None
        tied = config.tie_word_embeddings  # one tensor under one name, which nothing can untie by accident
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    generate = generation.generate
    save_pretrained = pretrained.save_pretrained
    stored_as = pretrained.stored_as
    from_pretrained = classmethod(pretrained.from_pretrained)

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation.

        layer norms                       weight 1, bias 0
        attn.c_proj, mlp.c_proj weights   N(0, initializer_range / sqrt(2 n_layer)), as 2 n_layer of them add up in the
                                          residual stream; not with norm_position "post", which has no such sum
        all other weights                 N(0, initializer_range)
        all biases                        0
        """
        std = self.config.initializer_range
        summed = 2 * self.config.n_layer if self.config.norm_position == "pre" else 1
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:  # the weight of a layer norm
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std / math.sqrt(summed) if "c_proj" in name else std)

    def num_parameters(self, non_embedding: bool = False) -> int:
        """How many numbers the model learns; non_embedding leaves out wte and wpe, as the scaling laws count.

        A tied wte counts once, or not at all; an untied lm_head always counts.
        """
        looked_up = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        return sum(p.numel() for p in self.parameters() if not (non_embedding and id(p) in looked_up))

    def estimate_flops(
        self,
        length: int | None = None,
        batch_size: int = 1,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        backward: bool = False,
    ) -> int:
        """FLOPs of a forward pass over batch_size rows of `length` tokens (None: n_positions), counted from modules.

        2 for each weight that a token is multiplied with, and 4 * C for each pair of query and key (Chowdhery et al.
        2022, appendix B): L * L of them in a document of L tokens, L * window in a banded layer, although a causal
        kernel may spare up to half. Norms, GELU, softmax and lookups are left out. With the boundaries cu_seqlens of
        packed documents, instead of length and batch_size, their real lengths count. backward adds 2 times as much.
        Raises ValueError where there is no token, or boundaries fall.
        """
        if cu_seqlens is None:
            ends = [self.config.n_positions if length is None else length] * batch_size
            lengths = torch.tensor(ends, dtype=torch.int64, device="cpu")
        elif length is not None or batch_size != 1:
            raise ValueError("cu_seqlens says how long each document is; leave length and batch_size out")
        else:
            lengths = torch.as_tensor(cu_seqlens, dtype=torch.int64, device="cpu").diff()
        if len(lengths) == 0 or int(lengths.min()) < 0 or int(lengths.sum()) == 0:
            raise ValueError(
                f"a pass has a document or more, of a token or more, but their lengths are {lengths.tolist()}"
            )
        weights, pairs = 0, 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                weights += module.weight.numel()
            elif isinstance(module, Attention):
                keys = lengths if module.window is None else lengths.clamp(max=module.window[0] + 1)
                pairs += int((lengths * keys).sum())
        if self.lm_head is None:
            weights += self.wte.weight.numel()
        forward = 2 * weights * int(lengths.sum()) + 4 * self.config.n_embd * pairs
        return 3 * forward if backward else forward

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """How many labels the loss of a batch is a mean over: see `labels` of forward."""
        targets = targets_of(batch["labels"], batch.get("attention_mask"), batch.get("cu_seqlens"))
        return int((targets != IGNORED).sum())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Segments | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
    ) -> GPTOutput:
        """Logits for the token after each token, and the loss against labels.

        input_ids: (B, T) int64 or int32.
        attention_mask: (B, T) of 0 and 1; padding on either side, so that each row's ones are in one run.
        labels: (B, T), shifted here: labels[:, t] is compared with the logits at t - 1, so input_ids is what to pass.
            The loss is the mean of the cross entropy over the labels that are not -100, are not padding and have a
            token before them in the same document; 0 where there is none.
        cu_seqlens: boundaries of packed documents in the B * T tokens (see ops.attention): attention stays inside each
            document, and positions begin again at 0. A pair of boundaries goes with a cache and position_ids.
        position_ids: (T,) or (B, T), where the positions are not to be counted here.
        cache: keys and values of the tokens before these, to which these are added.
        return_logits: False with labels computes the loss by ops.linear_cross_entropy, which never materialises the
            (B, T, V) logits; the logits returned are then (B, 0, V).
        logits_to_keep: compute logits for the last so many tokens only, 0 for all; or for the tokens at these indices,
            a 1-D tensor. As in transformers.

        Raises ValueError or TypeError, with the numbers in question, for inputs that do not fit the model or
        each other. Values are checked on the CPU outside of torch.compile; elsewhere PyTorch's own assertions stop a
        wild read.
        """
        config = self.config
        _check_arguments(config, input_ids, attention_mask, labels, cu_seqlens, position_ids, cache)
        _check_outputs(input_ids, labels, cache, return_logits, logits_to_keep)
        B, T = input_ids.shape
        if attention_mask is not None:
            cu_seqlens = segments_of(attention_mask)
        if position_ids is None and isinstance(cu_seqlens, Tensor):
            position_ids = places_in(cu_seqlens, B, T)
        elif position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + T, device=input_ids.device)
        _check_values(config, input_ids, attention_mask, labels, cu_seqlens, position_ids)

        # A dense gradient of wte would be all zeros but for T rows. They are added to that of the output projection in
        # place: autograd has it last, and holds nothing else that has its memory, because of an alias made first
        output_weight = torch.ops.aten.alias((self.wte if self.lm_head is None else self.lm_head).weight)  # (V, C)
        sparse = self.lm_head is None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        x = F.embedding(input_ids, self.wte.weight, sparse=sparse)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(position_ids)
        else:
            x = x * math.sqrt(config.n_embd) + sinusoids(position_ids, x)  # the factor: Vaswani et al., section 3.4
        x, update = self.drop(x), None
        for block in self.h:
            x, update = block(x, update, cu_seqlens, cache)
        if cache is not None:
            cache.length += T
        if self.ln_f is not None:
            x, _ = self.ln_f(x, update)
        targets = None if labels is None else targets_of(labels, attention_mask, cu_seqlens).long()
        if targets is not None and not return_logits:
            loss = ops.linear_cross_entropy(x, output_weight, targets, ignore_index=IGNORED)
            return GPTOutput(x.new_empty(B, 0, config.vocab_size), loss)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = F.linear(x[:, kept], output_weight)  # (B, T, V)
        if targets is None:
            return GPTOutput(logits, None)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return GPTOutput(logits, total / (targets != IGNORED).sum().clamp(min=1))


def sinusoids(position_ids: Tensor, like: Tensor) -> Tensor:
    """Vaswani et al. 2017, section 3.5: (..., T) -> (..., T, C), by turns the sine and cosine of C / 2 wavelengths."""
    C = like.shape[-1]
    rate = 10000.0 ** (-torch.arange(0, C, 2, device=like.device) / C)
    angle = position_ids[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).to(like.dtype)


def targets_of(labels: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Segments | None = None) -> Tensor:
    """What each token is to predict, (B, T): the label after it, or IGNORED, as GPT.forward says of the labels."""
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, IGNORED)
        cu_seqlens = segments_of(attention_mask)
    if isinstance(cu_seqlens, Tensor):
        labels = labels.masked_fill(places_in(cu_seqlens, *labels.shape) == 0, IGNORED)  # nothing before it
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def segments_of(attention_mask: Tensor) -> Tensor:
    """cu_seqlens (3B + 1,) of padded rows: padding, text, padding, each of which may be empty."""
    B, T = attention_mask.shape
    row = torch.arange(B, device=attention_mask.device) * T
    start = row + attention_mask.int().argmax(1)  # of the first one
    end = start + attention_mask.sum(1)
    return F.pad(torch.stack([start, end, row + T], 1).flatten(), (1, 0))


def places_in(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Where each of the B * T tokens is in its segment, from 0: (B, T)."""
    token = torch.arange(B * T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[segment]).view(B, T)


def _check_arguments(
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    cu_seqlens: Segments | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> None:
    """What shapes and dtypes tell: costs nothing, and nothing inside a compiled graph."""
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
    if isinstance(cu_seqlens, Tensor) and (cu_seqlens.ndim != 1 or len(cu_seqlens) < 2):
        raise ValueError(f"cu_seqlens should be one list of two boundaries or more, not {tuple(cu_seqlens.shape)}")
    if isinstance(cu_seqlens, tuple) and (cache is None or position_ids is None):
        raise ValueError("a pair of cu_seqlens is for queries against a longer cache: pass cache and position_ids too")
    past = 0 if cache is None else cache.length
    if past > 0 and (attention_mask is not None or isinstance(cu_seqlens, Tensor)):
        raise ValueError(f"the cache holds {past} tokens: say which belong together by a pair of cu_seqlens")
    if position_ids is None and attention_mask is None and cu_seqlens is None and past + T > config.n_positions:
        raise ValueError(f"sequence of {past + T} tokens, but this model has {config.n_positions} positions")


def _check_outputs(
    input_ids: Tensor, labels: Tensor | None, cache: KVCache | None, return_logits: bool, logits_to_keep: int | Tensor
) -> None:
    T = input_ids.shape[1]
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"logits_to_keep is {logits_to_keep.dtype} of shape {tuple(logits_to_keep.shape)}, "
                "expected a number or 1-D int64 or int32 indices"
            )
    elif not 0 <= logits_to_keep <= T:
        raise ValueError(f"logits_to_keep {logits_to_keep} should be between 0 (all) and the {T} tokens of input_ids")
    everything = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0
    if labels is not None and (cache is not None or not everything):
        raise ValueError("labels need the logits of the whole sequence: pass no cache, and logits_to_keep=0")
    if labels is None and not return_logits:
        raise ValueError("return_logits=False returns the loss alone, which needs labels")


def _check_values(
    config: GPTConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    cu_seqlens: Segments | None,
    position_ids: Tensor,
) -> None:
    """What only the numbers tell: on the CPU, where to read them does not wait for a device, and not when compiling."""
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
    if isinstance(cu_seqlens, Tensor):
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
