"""What an adapter adds to one layer: low-rank products (LoRA, rsLoRA, DoRA), a copy of the layer, rows of an embedding.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds scale * B A to a frozen weight, where A is (r, in_features) and B is
(out_features, r); scale is alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). DoRA (Liu
et al. 2024, arXiv:2402.09353) also learns the norm of each row of the sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore import ops

EMBEDDINGS = ("wte", "tokens_embed")  # of GPT-2 and GPT-1
PARTS = "qkv"  # in the order of the rows of c_attn


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter changes; see add_adapter. The patterns replace r and alpha in layers with these names."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["c_attn"])
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    trainable_token_indices: list[int] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, r in [("r", self.r), *(("rank_pattern", r) for r in self.rank_pattern.values())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name} is {r!r}, expected a rank: a whole number from 1 on")
        for name, alpha in [("alpha", self.alpha), *(("alpha_pattern", a) for a in self.alpha_pattern.values())]:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"{name} is {alpha!r}, expected a positive number")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a probability in [0, 1)")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(f"target_modules is {self.target_modules!r}, expected a list of names or 'all-linear'")
        for name in ("target_modules", "modules_to_save"):
            if any(not isinstance(entry, str) or not entry for entry in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected names of layers")
        ids = self.trainable_token_indices
        if any(not isinstance(id, int) or isinstance(id, bool) or id < 0 for id in ids) or len(set(ids)) < len(ids):
            raise ValueError(f"trainable_token_indices is {ids!r}, expected token ids, each once")


class Layer(NamedTuple):
    """A module with tensors of its own: its name in files, and which of its tensors are transposed there."""

    name: str
    module: Any
    transposed: dict[str, bool]

    @property
    def is_linear(self) -> bool:
        sizes = (getattr(self.module, name, None) for name in ("in_features", "out_features"))
        return all(isinstance(size, int) for size in sizes) and not self.is_embedding

    @property
    def is_embedding(self) -> bool:
        return self.name.rpartition(".")[2] in EMBEDDINGS

    @property
    def parts(self) -> str:
        divides = self.name.endswith("c_attn") and self.module.out_features == 3 * self.module.in_features
        return PARTS if divides else ""


def is_named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def pattern_of(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if is_named(name, key)), default)


def float_weight(module: nn.Module) -> Tensor:
    """Return the weight of the base. Raises ValueError for a layer that has none of a floating-point dtype."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.dtype.is_floating_point:
        raise ValueError(
            f"a {type(module).__name__} has no floating-point parameter `weight` to merge with, to rescale or to copy; "
            "load the base with a dtype such as torch.float32"
        )
    return weight


def trains_weight(module: nn.Module) -> bool:
    """Return whether the backward pass computes a gradient for the whole weight that forward reads."""
    used = getattr(module._modules.get("lora"), "used", None)
    if used is not None and not used.in_forward:
        return any(parameter.requires_grad for parameter in used.parameters())
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad


class LoRA(nn.Module):
    """Adds scale * B A to the weight of a linear layer, or to the rows of some of its parts q, k and v."""

    def __init__(self, layer: Layer, config: AdapterConfig, parts: str, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        inputs, outputs = layer.module.in_features, layer.module.out_features
        r, alpha = (pattern_of(pattern, layer.name, default) for pattern, default in (
            ({} if parts else config.rank_pattern, config.r), ({} if parts else config.alpha_pattern, config.alpha)
        ))  # fmt: skip
        if r > max(inputs, outputs):
            raise ValueError(
                f"r is {r}, but {layer.name} has {inputs} inputs and {outputs} outputs; use a smaller rank"
            )
        if config.dora and parts:
            raise ValueError(f"dora rescales all outputs of {layer.name}: target it whole, not {parts[0]} alone")
        self.in_forward = layer.name != "lm_head"  # GPT does not call it, but reads its weight
        if not self.in_forward or config.dora:
            float_weight(layer.module)
        if config.dropout and not self.in_forward:
            raise ValueError("dropout cannot be applied to the inputs of lm_head: use dropout=0 or another target")
        count = len(parts) or 1
        self.parts, self.outputs, self.dropout = parts, outputs, config.dropout
        self.scale = alpha / math.sqrt(r) if config.rslora else alpha / r
        make = functools.partial(torch.empty, dtype=dtype, device=device)
        self.A = nn.Parameter(make(count * r, inputs))
        self.B = nn.Parameter(make(outputs * count // 3 if parts else outputs, r))
        self.magnitude: nn.Parameter | None = nn.Parameter(make(outputs)) if config.dora else None

    def initialise(self, module: nn.Module) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as peft
        nn.init.zeros_(self.B)
        if self.magnitude is not None:
            self.magnitude.data.copy_(self._norm(float_weight(module)))

    def extra_repr(self) -> str:
        return f"r={self.B.shape[1]}, scale={self.scale:g}, parts={self.parts!r}, dropout={self.dropout}"

    def forward(self, module: Any, x: Tensor, out: Tensor) -> Tensor:
        """Return the output of the layer with this adapter, given that without it."""
        A: Tensor = self.A
        B = self.rows()
        if not torch.is_autocast_enabled(x.device.type):
            A, B = A.to(x.dtype), B.to(x.dtype)
        delta = ops.linear(ops.linear(F.dropout(x, self.dropout, self.training), A) * self.scale, B)
        if self.magnitude is None:
            return out.add_(delta)
        gain = (self.magnitude / self._norm(float_weight(module))).to(out.dtype)
        if module.bias is None:
            return (out + delta) * gain
        bias = module.bias.to(out.dtype)
        return (out - bias + delta) * gain + bias

    def change(self, name: str, base: Tensor) -> Tensor:
        """Return a parameter of the layer with this adapter in it, in its own dtype."""
        if name != "weight":
            return base
        total = self._sum(base)
        if self.magnitude is not None:
            total = total * (self.magnitude / self._norm(base))[:, None]
        return total.to(base.dtype)

    def stored(self, transposed: Mapping[str, bool]) -> dict[str, Tensor]:
        """Return the tensors of peft's file, in which parts of c_attn are blocks of one matrix B."""
        tensors = {"lora_A.weight": self.A, "lora_B.weight": self.rows()}
        return tensors | ({} if self.magnitude is None else {"lora_magnitude_vector": self.magnitude})

    def read(self, tensors: Mapping[str, Tensor], transposed: Mapping[str, bool]) -> None:
        self.A.data.copy_(tensors["lora_A.weight"])
        B = tensors["lora_B.weight"]
        self.B.data.copy_(torch.cat([B[rows, columns] for rows, columns in self._blocks()]) if self.parts else B)
        if not torch.equal(self.rows().to(B.dtype), B):
            raise ValueError(f"lora_B has numbers outside of the blocks of {self.parts}, or that {self.B.dtype} lacks")
        if self.magnitude is not None:
            self.magnitude.data.copy_(tensors["lora_magnitude_vector"])

    def _blocks(self) -> list[tuple[slice, slice]]:
        width, r = self.outputs // 3, self.B.shape[1]
        starts = [width * PARTS.index(part) for part in self.parts]
        return [(slice(start, start + width), slice(i * r, i * r + r)) for i, start in enumerate(starts)]

    def rows(self) -> Tensor:
        """Return B (out_features, rows of A)."""
        if not self.parts:
            return self.B
        rows = self.B.new_zeros(self.outputs, len(self.A))
        for block, part in zip(self._blocks(), self.B.chunk(len(self.parts)), strict=True):
            rows[block] = part
        return rows

    def _sum(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(wide) + self.scale * (self.rows().to(wide) @ self.A.to(wide))

    @torch.no_grad()  # the paper's section 4.3: the norm is a constant in the backward pass
    def _norm(self, weight: Tensor) -> Tensor:
        return self._sum(weight).norm(dim=1)


class Copy(nn.Module):
    """Trains a copy of a layer's parameters."""

    in_forward = False

    def __init__(self, layer: Layer, device: Any) -> None:
        super().__init__()
        if hasattr(layer.module, "weight"):
            float_weight(layer.module)
        for name, parameter in layer.module.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=device)))

    def initialise(self, module: nn.Module) -> None:
        for name, parameter in self.named_parameters():
            parameter.data.copy_(module._parameters[name])  # type: ignore[arg-type]

    def change(self, name: str, base: Tensor) -> Tensor:
        return self.get_parameter(name)

    def stored(self, transposed: Mapping[str, bool]) -> dict[str, Tensor]:
        return {name: tensor.t() if transposed.get(name) else tensor for name, tensor in self.named_parameters()}

    def read(self, tensors: Mapping[str, Tensor], transposed: Mapping[str, bool]) -> None:
        for name, target in self.stored(transposed).items():
            target.data.copy_(tensors[name])


class Rows(nn.Module):
    """Trains some rows of an embedding."""

    in_forward = False

    def __init__(self, layer: Layer, ids: Sequence[int], device: Any) -> None:
        super().__init__()
        weight = float_weight(layer.module)
        if beyond := [id for id in ids if id >= len(weight)]:
            raise ValueError(f"trainable_token_indices has {beyond[0]}, but {layer.name} has {len(weight)} rows")
        self.ids = list(ids)
        self.rows = nn.Parameter(weight.new_empty(len(ids), weight.shape[1], device=device))

    def initialise(self, module: nn.Module) -> None:
        self.rows.data.copy_(float_weight(module)[self.ids])

    def change(self, name: str, base: Tensor) -> Tensor:
        return base if name != "weight" else _ReplaceRows.apply(base, self.rows, self.ids)

    def stored(self, transposed: Mapping[str, bool]) -> dict[str, Tensor]:
        return {"token_adapter.trainable_tokens_delta": self.rows}  # the rows themselves, in spite of the name

    def read(self, tensors: Mapping[str, Tensor], transposed: Mapping[str, bool]) -> None:
        self.rows.data.copy_(tensors["token_adapter.trainable_tokens_delta"])


class _ReplaceRows(torch.autograd.Function):
    """index_copy whose gradient may be sparse, as that of an embedding lookup is."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, rows: Tensor, ids: list[int]) -> Tensor:
        ctx.ids = torch.tensor(ids, device=base.device)
        return base.index_copy(0, ctx.ids, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        chosen = grad.index_select(0, ctx.ids)
        return None, chosen.to_dense() if chosen.is_sparse else chosen, None


class Slot(nn.ModuleDict):
    """The adapters of one layer by name: the child `lora` of the layer."""

    active: str | None = None
    merged = False

    @property
    def used(self) -> Any:
        """Return the adapter that the layer computes with, or None."""
        return None if self.merged or self.active is None or self.active not in self else self[self.active]

    def connect(self, module: nn.Module) -> None:
        """Make the layer compute with the adapter that is used now; without one, it is as it was before."""
        self.disconnect(module)
        if self.used is not None and self.used.in_forward:
            module.register_forward_hook(self._after)
        elif self.used is not None:
            names = tuple(name for name, _ in module.named_parameters(recurse=False))
            cls: Any = type(module)
            module.__class__ = _reading_through(cls, names)

    def disconnect(self, module: nn.Module) -> None:
        for key in [key for key, hook in module._forward_hooks.items() if hook == self._after]:
            del module._forward_hooks[key]
        module.__class__ = getattr(type(module), "_without_adapters", type(module))

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Any:
        return self.used(module, args[0], out)


@functools.cache
def _reading_through(cls: Any, names: tuple[str, ...]) -> Any:
    """Return a subclass whose parameters, read as attributes, have the active adapter in them."""

    def reader(name: str) -> property:
        def read(module: Any) -> Tensor:
            base: Tensor = module._parameters[name]
            if hasattr(base, "to_local"):  # sharded: FSDP handles it, and has it whole while the layer computes
                return base
            changed: Tensor = module.lora.used.change(name, base)
            return changed

        return property(read)

    members: dict[str, Any] = {"_without_adapters": cls, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members | {name: reader(name) for name in names})
