"""Adding adapters to a model, selecting, merging and counting them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptcore.lora.layers import (
    EMBEDDINGS,
    AdapterConfig,
    Copy,
    Layer,
    LoRA,
    Rows,
    Slot,
    float_weight,
    is_named,
)


@dataclass
class Adapters:
    """The adapters of a model: its attribute `adapters`."""

    configs: dict[str, AdapterConfig]
    trained: set[str]  # parameters of the base that had requires_grad before
    active: str | None = None
    merged: bool = False


class Cost(NamedTuple):
    """Trained parameters, and bytes of a training step with AdamW beside its activations."""

    trained: int
    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


class Report(NamedTuple):
    """What training takes with the whole base trained, and with what has requires_grad now."""

    before: Cost
    after: Cost

    def __str__(self) -> str:
        before, after = self
        lines = [f"trained parameters {before.trained:,} -> {after.trained:,} ({after.trained / before.trained:.2%})"]
        for name in ("weights", "gradients", "moments", "total"):
            lines += [f"{name:<18} {getattr(before, name) / 1e6:,.1f} MB -> {getattr(after, name) / 1e6:,.1f} MB"]
        return "\n".join(lines)


def add_adapter(
    model: nn.Module,
    name: str = "default",
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str = ("c_attn",),
    rslora: bool = False,
    dora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    trainable_token_indices: Sequence[int] = (),
) -> Report:
    """Add an adapter that changes nothing yet, select it and freeze the base; returns what is now trained.

    r, alpha: the rank, and the numerator of the scale: alpha / r, or alpha / sqrt(r) with rslora.
    dropout: on the inputs of the adapter, by PyTorch's generator, as the model's other dropout of hidden states.
    target_modules: names of linear layers, or their ends, as "c_attn", "mlp.c_proj" or "h.0.attn.c_proj";
        "c_attn.q", "c_attn.k" and "c_attn.v" are the three parts of c_attn; "all-linear" is every linear layer but
        lm_head and modules_to_save. An untied lm_head may be named.
    modules_to_save: names of layers of which a copy is trained whole, as "ln_f" or "wte"; None for the head of a model
        for a task, which every adapter of it needs.
    trainable_token_indices: rows of the token embedding that are trained, and with it of a tied output projection.

    Raises ValueError for settings that are invalid or fit no layer, and for a name that is taken.
    """
    check_new(model, name)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    if modules_to_save is None:
        head = getattr(model, "head", None)
        modules_to_save = (
            [] if head is None else [layer.name for layer in layers_of(model) if layer.name.startswith(head)]
        )
    config = AdapterConfig(
        r, alpha, dropout, targets, rslora, dora, list(modules_to_save), list(trainable_token_indices)
    )
    plan = plan_of(model, config, device_of(model))
    if device_of(model).type != "meta":  # else `sharded_model` does it
        for layer, adapter in plan:
            adapter.initialise(layer.module)
    install(model, name, config, plan)
    return report(model)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Select the adapter that the model computes with and trains; None: the base alone, all of it frozen."""
    state = state_of(model)
    if name is not None and name not in state.configs:
        raise ValueError(f"there is no adapter {name!r}; the model has {listed(state.configs)}")
    _check_unmerged(state)
    state.active = name
    for module, slot in _slots(model):
        slot.active = name
        slot.connect(module)
        for key, adapter in slot.items():
            adapter.requires_grad_(key == name)


def merge_adapter(model: nn.Module, keep_original: bool = True) -> None:
    """Put the active adapter into the weights of the base, so that it costs no time.

    keep_original: a copy of each changed weight stays in memory, so that unmerge_adapter can restore its bits. False
        removes all adapters: the model is then a plain one, and as trainable as it was before.

    Raises ValueError if an adapter is merged already, or a layer has no floating-point weight.
    """
    state = state_of(model)
    _check_unmerged(state)
    if state.active is None:
        raise ValueError("no adapter is selected, so there is nothing to merge; select one with set_adapter")
    used = [(module, slot, slot.used) for module, slot in _slots(model) if slot.used is not None]
    for module, _, adapter in used:
        if not isinstance(adapter, Copy):
            float_weight(module)
    with torch.no_grad():
        for module, slot, adapter in used:
            for name, base in module.named_parameters(recurse=False):
                merged = adapter.change(name, base)
                if merged is not base:
                    if keep_original:
                        slot.register_buffer(f"original_{name}", base.detach().clone(), persistent=False)
                    base.copy_(merged)
    state.merged = True
    for module, slot in list(_slots(model)):
        slot.merged = True
        slot.requires_grad_(False)
        slot.connect(module)
        if not keep_original:
            del module.lora
    if not keep_original:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in state.trained)
        del model.adapters


def unmerge_adapter(model: nn.Module) -> None:
    """Restore the weights that merge_adapter changed, to the bit. Raises ValueError if nothing is merged."""
    state = state_of(model)
    if not state.merged:
        raise ValueError("no adapter is merged, so there is nothing to restore")
    for module, slot in _slots(model):
        for name, original in list(slot.named_buffers(recurse=False)):
            parameter = module._parameters[name.removeprefix("original_")]
            assert parameter is not None
            parameter.data.copy_(original)
            delattr(slot, name)
        slot.merged = False
    state.merged = False
    set_adapter(model, state.active)


def report(model: nn.Module) -> Report:
    """Return trained parameters and bytes, for full fine-tuning of the base and for what is trained now."""
    adapters = {id(tensor) for _, slot in _slots(model) for tensor in (*slot.parameters(), *slot.buffers())}
    parameters, buffers = list(model.parameters()), list(model.buffers())
    base = [p for p in parameters if id(p) not in adapters]
    fixed = sum(b.nbytes for b in buffers if id(b) not in adapters)

    def cost(held: Iterable[Tensor], trained: Sequence[Tensor]) -> Cost:
        moments = sum(p.numel() * (12 if p.itemsize == 2 else 8) for p in trained)  # and a master copy of 16 bits
        weights = fixed + sum(t.nbytes for t in held)
        return Cost(sum(p.numel() for p in trained), weights, sum(p.nbytes for p in trained), moments)

    kept = [b for b in buffers if id(b) in adapters]
    return Report(cost(base, base), cost([*parameters, *kept], [p for p in parameters if p.requires_grad]))


def is_unmerged(model: nn.Module) -> bool:
    """Return whether the model computes with an adapter that is not in its weights."""
    state: Adapters | None = getattr(model, "adapters", None)
    return state is not None and state.active is not None and not state.merged


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return model.state_dict() without adapters. Raises ValueError if is_unmerged."""
    if is_unmerged(model):
        raise ValueError(
            f"the model computes with the adapter {state_of(model).active!r}: merge_adapter puts it into the weights, "
            "save_adapter writes it alone, and set_adapter(model, None) selects the base"
        )
    return without_adapters(model)


def without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return model.state_dict() without adapters, whatever the model computes with."""
    return {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name.split(".")}


def initialise_adapters(model: nn.Module) -> None:
    """Give all adapters of a model, in the order in which they were added, the values that add_adapter gives them."""
    for name in state_of(model).configs if hasattr(model, "adapters") else ():
        for module, slot in _slots(model):
            adapters: dict[str, Any] = dict(slot.items())
            if name in adapters:
                adapters[name].initialise(module)


# ---- the layers of a model -------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> Adapters:
    state: Adapters | None = getattr(model, "adapters", None)
    if state is None:
        raise ValueError("the model has no adapter; add one with add_adapter or load_adapter")
    return state


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, Slot]]:
    for module in list(model.modules()):
        if isinstance(slot := module._modules.get("lora"), Slot):
            yield module, slot


def slot_of(module: nn.Module) -> Slot | dict[str, Any]:
    slot = module._modules.get("lora")
    return slot if isinstance(slot, Slot) else {}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the layers that have tensors, under the names that transformers and peft have for them."""
    if hasattr(model, "stored_as"):
        layout = model.stored_as()  # type: ignore[operator]
    else:
        layout = {name: (name, False) for name in model.state_dict()}
    names: dict[str, tuple[str, dict[str, bool]]] = {}
    for own, (stored, transposed) in layout.items():
        if "lora" not in own.split("."):
            place, _, tensor = own.rpartition(".")
            names.setdefault(place, (stored.rpartition(".")[0], {}))[1][tensor] = transposed
    return [Layer(stored, model.get_submodule(place), tensors) for place, (stored, tensors) in names.items()]


def plan_of(
    model: nn.Module, config: AdapterConfig, device: torch.device | str, from_file: bool = False
) -> list[tuple[Layer, LoRA | Copy | Rows]]:
    """Return the layers that an adapter changes, and its part in each, without values; changes nothing.

    from_file: peft lists modules_to_save there that a model need not have.
    """
    layers = layers_of(model)
    plan: list[tuple[Layer, LoRA | Copy | Rows]] = []
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    targets = [] if isinstance(config.target_modules, str) else config.target_modules
    names = {layer.name for layer in layers if layer.is_linear}
    parts = {f"{layer.name}.{part}" for layer in layers if layer.is_linear for part in layer.parts}
    _check_names("target_modules", targets, names | parts)
    if not from_file:
        _check_names("modules_to_save", config.modules_to_save, {layer.name for layer in layers})
    for layer in layers:
        saved = any(is_named(layer.name, wanted) for wanted in config.modules_to_save)
        if saved:
            plan.append((layer, Copy(layer, device)))
        if layer.is_embedding and config.trainable_token_indices:
            if saved:
                raise ValueError(f"{layer.name} is in modules_to_save: leave out trainable_token_indices")
            plan.append((layer, Rows(layer, config.trainable_token_indices, device)))
        if not layer.is_linear:
            continue
        whole = any(is_named(layer.name, wanted) for wanted in targets)
        chosen = "".join(p for p in layer.parts if any(is_named(f"{layer.name}.{p}", wanted) for wanted in targets))
        if (whole and chosen) or ((whole or chosen) and saved):
            other = "modules_to_save has it" if saved else f"{layer.name}.{chosen[0]} is a part of it"
            raise ValueError(f"target_modules has {layer.name}, but {other} as well: name it once")
        if whole or chosen or (config.target_modules == "all-linear" and not saved and layer.name != "lm_head"):
            plan.append((layer, LoRA(layer, config, chosen, dtype, device)))
    if config.trainable_token_indices and not any(isinstance(adapter, Rows) for _, adapter in plan):
        raise ValueError(f"trainable_token_indices needs a token embedding {' or '.join(EMBEDDINGS)}")
    if not plan:
        raise ValueError("the adapter changes no layer: give target_modules or modules_to_save")
    return plan


def _check_names(setting: str, wanted: Sequence[str], names: set[str]) -> None:
    for entry in wanted:
        if not any(is_named(name, entry) for name in names):
            short = sorted({re.sub(r".*\bh\.\d+\.", "", name).removeprefix("transformer.") for name in names})
            raise ValueError(f"{setting} has {entry!r}, which no layer is named; there are {', '.join(short)}")


def check_new(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(Slot, name):
        raise ValueError(f"an adapter cannot be named {name!r}; use letters, digits and dashes, as 'default'")
    if (state := getattr(model, "adapters", None)) is not None:
        if name in state.configs:
            raise ValueError(f"the model has an adapter {name!r} already; give this one another name")
        _check_unmerged(state)


def _check_unmerged(state: Adapters) -> None:
    if state.merged:
        raise ValueError(f"the adapter {state.active!r} is merged into the weights; call unmerge_adapter first")


def install(model: nn.Module, name: str, config: AdapterConfig, plan: list[tuple[Layer, Any]]) -> None:
    if not hasattr(model, "adapters"):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.adapters = Adapters({}, trained)  # type: ignore[assignment]
        model.requires_grad_(False)
    for layer, adapter in plan:
        if "lora" not in layer.module._modules:
            layer.module.add_module("lora", Slot())
        layer.module.lora[name] = adapter
        layer.module.lora.train(layer.module.training)
    state = state_of(model)
    state.configs[name] = config
    set_adapter(model, name)


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
