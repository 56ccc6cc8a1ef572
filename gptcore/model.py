"""GPT, after OpenAI's GPT-2 (Radford et al. 2019), on gptcore's kernels.

Parameters have the names of the published weights, in the order of computation: wte wpe h.N.ln_1 attn.c_attn
attn.c_proj ln_2 mlp.c_fc mlp.c_proj ln_f lm_head. GPTConfig also covers GPT-1 (Radford et al. 2018; post-norm) and
GPT-3 (Brown et al. 2020; local attention in every second layer).

Shapes: B batch, T tokens, C = n_embd, H heads of D dimensions, V vocabulary.

Modules to register a forward hook on, to capture a tensor (B, T, C); layer norms return (normalised, residual stream):

                                     GPT-2, GPT-3 (pre-norm)         GPT-1 (post-norm)
    token and position embeddings    drop                            drop
    residual stream into layer i     h[i].ln_1, output[1]            h[i - 1].ln_2, output[0]
    attention output of layer i      h[i].attn                       h[i].attn
    residual stream into MLP i       h[i].ln_2, output[1]            h[i].ln_1, output[0]
    MLP output of layer i            h[i].mlp                        h[i].mlp
    residual stream, last layer      ln_f, output[1]                 h[-1].ln_2, output[0]
    input of the output projection   ln_f, output[0]                 h[-1].ln_2, output[0]
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
from gptcore.generation import step
from gptcore.generation.cache import KVCache
from gptcore.hf import pretrained
from gptcore.inputs import check_outputs, check_shapes, check_values, cu_seqlens_of, positions_in, targets_of
from gptcore.lora.layers import trains_weight
from gptcore.memory import check_fits
from gptcore.ops.arguments import autocast_dtype
from gptcore.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight


class GPTOutput(NamedTuple):
    """The result of a forward pass; `logits, loss = model(...)` works too."""

    logits: Tensor  # (B, T, V), or fewer tokens with logits_to_keep
    loss: Tensor | None  # (), float32; None without labels


class Linear(nn.Linear):
    """torch.nn.Linear through ops.linear."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Layer norm that first adds its input to the residual stream, in one kernel: norm(residual + hidden)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.layer_norm_epsilon

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, reader: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (norm(residual + hidden), residual + hidden); the second is the new residual stream.

        reader: the layer that alone reads the first. If it is a Linear, autocast's cast is done in the same kernel.
        """
        stream = hidden if residual is None else residual
        dtype = autocast_dtype(hidden) if type(reader) is Linear and stream.dtype == torch.float32 else None
        if hidden.dtype not in (torch.float32, dtype):
            dtype = None
        options: Any = {"eps": self.eps, "out_dtype": dtype}
        if residual is None:  # the first norm: its input is the residual stream
            return ops.layer_norm(hidden, self.weight, self.bias, **options), hidden
        return ops.layer_norm(hidden, self.weight, self.bias, residual=residual, **options)


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
        # GPT-3 alternates dense and locally banded layers (section 2.1); the window includes the query's own position
        self.window: tuple[int, int] | None = None
        if config.attention_window is not None and layer % 2 == 1:
            self.window = (config.attention_window - 1, 0)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        dropout_p = self.attn_pdrop if self.training else 0.0
        settings: Any = {"scale": self.scale, "window": self.window, "dropout_p": dropout_p}
        if cache is None:
            y = ops.attention_qkvpacked(qkv, cu_seqlens=cu_seqlens, **settings)  # (B, T, H, D)
        else:
            y = cache.attend(self.layer, qkv, cu_seqlens, **settings)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))  # concatenates the heads


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
    """Attention, then MLP, each with a layer norm before it ("pre") or after it ("post")."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.post_norm = config.norm_position == "post"

    def forward(
        self, hidden: Tensor, residual: Tensor | None, cu_seqlens: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (MLP output, residual stream), which the next layer norm adds; with "post" (output of ln_2, None)."""
        if self.post_norm:
            hidden, _ = self.ln_1(self.attn(hidden, cu_seqlens, cache), hidden)
            hidden, _ = self.ln_2(self.mlp(hidden), hidden)
            return hidden, None
        hidden, residual = self.ln_1(hidden, residual, self.attn.c_attn)
        hidden = self.attn(hidden, cu_seqlens, cache)
        hidden, residual = self.ln_2(hidden, residual, self.mlp.c_fc)
        hidden = self.mlp(hidden)
        return hidden, residual


class GPT(nn.Module):
    """A GPT language model with freshly initialised weights, drawn from PyTorch's global generator.

    The same torch.manual_seed gives the same weights. On the meta device, call to_empty and then init_weights.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        check_fits(config.num_parameters, torch.get_default_dtype(), torch.get_default_device())
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position_embedding == "learned"
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if learned else None
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config) if config.norm_position == "pre" else None
        tied = config.tie_word_embeddings  # registered once, as wte: no code can untie it by accident
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    generate = generation.generate
    stream = generation.stream
    save_pretrained = pretrained.save_pretrained
    stored_as = pretrained.stored_as
    from_pretrained = classmethod(pretrained.from_pretrained)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters in place, as GPT-2 does.

        layer norms                       weight 1, bias 0
        attn.c_proj, mlp.c_proj weights   N(0, initializer_range / sqrt(2 n_layer)), because 2 n_layer outputs are added
                                          to the residual stream; norm_position "post": N(0, initializer_range)
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
        """Return the number of parameters; non_embedding excludes wte and wpe (Kaplan et al. 2020, section 2.1).

        A tied wte is counted once, or not at all with non_embedding; an untied lm_head is always counted.
        """
        embeddings = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        looked_up = {id(parameter) for module in embeddings for parameter in module.parameters()}
        count = sum(p.numel() for p in self.parameters() if not (non_embedding and id(p) in looked_up))
        quantized = QuantizedLinear if non_embedding else QuantizedWeight
        return count + sum(module.numel() for module in self.modules() if isinstance(module, quantized))

    def estimate_flops(
        self,
        length: int | None = None,
        batch_size: int = 1,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        backward: bool = False,
    ) -> int:
        """Return the FLOPs of a forward pass over batch_size rows of `length` tokens (None: n_positions).

        These are 2 FLOPs per token and weight of a linear layer, and 4 * C per layer and pair of query and key
        (Chowdhery et al. 2022, appendix B). A document of L tokens counts as L * L pairs (L * window in layers with
        local attention), although causal kernels compute only half of them. Norms, GELU, softmax and embedding lookups
        are not counted. For packed documents pass cu_seqlens instead of length and batch_size. With backward the result
        is 3 times as large, less the gradients of frozen weights.
        Raises ValueError if there are no tokens or if cu_seqlens decreases.
        """
        if cu_seqlens is None:
            ends = [self.config.n_positions if length is None else length] * batch_size
            lengths = torch.tensor(ends, dtype=torch.int64, device="cpu")
        elif length is not None or batch_size != 1:
            raise ValueError(f"got cu_seqlens and length={length}, batch_size={batch_size}; pass cu_seqlens alone")
        else:
            lengths = torch.as_tensor(cu_seqlens, dtype=torch.int64, device="cpu").diff()
        if len(lengths) == 0 or int(lengths.min()) < 0 or int(lengths.sum()) == 0:
            raise ValueError(f"document lengths are {lengths.tolist()}, expected no negative number and a positive sum")
        weights, frozen, pairs = 0, 0, 0
        for module in self.modules():
            if isinstance(module, nn.Linear | QuantizedLinear):
                weights += module.in_features * module.out_features
                frozen += module.in_features * module.out_features * (not trains_weight(module))
            elif isinstance(module, Attention):
                keys = lengths if module.window is None else lengths.clamp(max=module.window[0] + 1)
                pairs += int((lengths * keys).sum())
        if self.lm_head is None:
            weights += self.config.vocab_size * self.config.n_embd
            frozen += self.config.vocab_size * self.config.n_embd * (not trains_weight(self.wte))
        forward = 2 * weights * int(lengths.sum()) + 4 * self.config.n_embd * pairs
        return 3 * forward - 2 * frozen * int(lengths.sum()) if backward else forward

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return how many labels the mean loss of a batch is taken over (see `labels` of forward)."""
        targets = targets_of(batch["labels"], batch.get("attention_mask"), batch.get("cu_seqlens"))
        return int((targets != IGNORED).sum())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
    ) -> GPTOutput:
        """Return the logits of the next token at each position, and the loss against labels.

        input_ids: (B, T) int64 or int32.
        attention_mask: (B, T) of 0 and 1; padding may be on both sides, but the ones of a row are contiguous.
        labels: (B, T), which the model shifts: labels[:, t] is compared with the logits at t - 1, so input_ids can be
            passed. The loss is the mean cross entropy over all labels except -100, padding and the first token of each
            document; 0 if none remain.
        cu_seqlens: boundaries of packed documents in the B * T tokens (see ops.attention): attention stays inside each
            document, and positions begin again at 0.
        position_ids: (T,) or (B, T); by default positions count from the start of each row or document.
        cache: keys and values of earlier tokens; those of input_ids are appended (see KVCache).
        return_logits: False with labels computes the loss without materialising the (B, T, V) logits; the logits
            returned are then (B, 0, V).
        logits_to_keep: as in transformers, compute logits for the last n tokens (0: all), or for a 1-D tensor of token
            indices.

        Raises ValueError or TypeError, with the numbers in question, for inputs that do not fit the model or
        each other. Values are checked on the CPU outside of torch.compile; on other devices PyTorch's own assertions
        catch out-of-range indices.
        """
        check_shapes(self.config, input_ids, attention_mask, labels, cu_seqlens, position_ids, cache)
        check_outputs(input_ids, labels, cache is not None, return_logits, logits_to_keep)
        projection: nn.Module = self.wte if self.lm_head is None else self.lm_head
        output_weight = projection if isinstance(projection, QuantizedWeight) else self.output_weight()
        # A sparse gradient has B * T rows instead of a mostly zero (V, C) tensor. With a tied weight it is added to the
        # projection's dense gradient, so wte.weight.grad is dense.
        sparse = self.lm_head is None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        hidden = self._features(input_ids, attention_mask, labels, cu_seqlens, position_ids, cache, sparse)
        if labels is None:
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            return GPTOutput(project(hidden[:, kept], output_weight), None)
        targets = targets_of(labels, attention_mask, cu_seqlens).long()
        if not return_logits:
            if isinstance(output_weight, QuantizedWeight):
                loss = output_weight.cross_entropy(hidden, targets)
            else:
                loss = ops.linear_cross_entropy(hidden, output_weight, targets, ignore_index=IGNORED)
            return GPTOutput(hidden.new_empty(len(hidden), 0, self.config.vocab_size), loss)
        logits = project(hidden, output_weight)  # (B, T, V)
        return GPTOutput(logits, mean_cross_entropy(logits, targets))

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return the input of the output projection, (B, T, C), on which a head for a task stands (see forward)."""
        check_shapes(self.config, input_ids, attention_mask, None, None, position_ids, None)
        return self._features(input_ids, attention_mask, None, None, position_ids, None)

    def _features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        sparse: bool = False,
    ) -> Tensor:
        B, T = input_ids.shape
        if attention_mask is not None:
            cu_seqlens = cu_seqlens_of(attention_mask)
        cached_positions = None if cache is None else cache.begin(input_ids, cu_seqlens)
        if position_ids is None:
            position_ids = cached_positions
        if position_ids is None and cu_seqlens is not None:
            position_ids = positions_in(cu_seqlens, B, T)
        elif position_ids is None:
            position_ids = torch.arange(T, device=input_ids.device)
        check_values(self.config, input_ids, attention_mask, labels, cu_seqlens, position_ids)

        hidden, residual = self.drop(self._embed(input_ids, position_ids, sparse)), None  # (B, T, C)
        for block in self.h:
            hidden, residual = block(hidden, residual, cu_seqlens, cache)
        if self.ln_f is not None:
            hidden, _ = self.ln_f(hidden, residual)
        if cache is not None:
            cache.end()
        return hidden

    def output_weight(self) -> Tensor:
        """Return an alias of the output projection's weight (V, C), made before the embedding lookup.

        Autograd then computes the lookup's sparse gradient of a tied weight (B * T rows) before the alias's gradient,
        and adds it in place to the dense gradient of linear_cross_entropy, without a second (V, C) tensor.
        """
        return torch.ops.aten.alias((self.wte if self.lm_head is None else self.lm_head).weight)

    def _embed(self, input_ids: Tensor, position_ids: Tensor, sparse: bool = False) -> Tensor:
        wte: nn.Module = self.wte
        if isinstance(wte, QuantizedEmbedding):
            tokens = wte(input_ids, next(self.parameters()).dtype)
        else:
            tokens = F.embedding(input_ids, self.wte.weight, sparse=sparse)  # (B, T, C)
        if self.wpe is not None:
            return tokens + self.wpe(position_ids)
        # Scaled as in Vaswani et al. 2017, section 3.4
        return tokens * math.sqrt(self.config.n_embd) + sinusoids(position_ids, tokens)


step.register(GPT, Block, Attention, MLP, LayerNorm, Linear, QuantizedLinear, QuantizedEmbedding)


def project(hidden: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """Return the logits (B, T, V) of hidden (B, T, C)."""
    return weight.project(hidden) if isinstance(weight, QuantizedWeight) else ops.linear(hidden, weight)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy, in float32, over the targets that are not IGNORED; 0 if all are ignored."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def sinusoids(position_ids: Tensor, like: Tensor) -> Tensor:
    """Return position encodings (..., T, C), interleaved sines and cosines (Vaswani et al. 2017, section 3.5)."""
    C = like.shape[-1]
    exponent = torch.arange(0, C, 2, dtype=torch.float32, device=like.device) / C
    rate = 10000.0**-exponent
    angle = position_ids[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).to(like.dtype)
