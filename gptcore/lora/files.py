"""Adapters in peft's two files, adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.files import PathLike, atomic_file, from_json, make_folder, naming, read_json, write_json
from gptcore.hf.hub import find_folder
from gptcore.lora.adapters import (
    Report,
    check_new,
    device_of,
    install,
    layers_of,
    listed,
    plan_of,
    report,
    slot_of,
    state_of,
)
from gptcore.lora.layers import EMBEDDINGS, AdapterConfig, Copy, Layer, LoRA, float_weight
from gptcore.tensor_file import TensorFile, save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
HEAD = f"{PREFIX}lm_head.weight"
TARGETS = "gptcore.target_modules"  # metadata of the weights, where target_modules has parts of c_attn
RENAMED = {"lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"}
# Keys that change nothing in an adapter that is read
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
TASKS = {  # task_type, by the end of the class's name
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
INITIALISED = (True, False, "gaussian", "orthogonal", "eva", None)  # init_lora_weights that leave the base as it is


def load_adapter(model: nn.Module, name_or_path: PathLike, name: str = "default") -> Report:
    """Add an adapter from a folder that save_adapter or peft wrote, or from the Hub, and select it.

    Raises FileNotFoundError, or ValueError: for an option that gptcore does not have, and for tensors that are missing,
    unexpected, of another shape or not finite, with the first of them. The model is then as it was.
    """
    check_new(model, name)
    if device_of(model).type == "meta":
        raise ValueError("the model has no memory yet, on the meta device, so no adapter can be loaded into it")
    folder = find_folder(name_or_path, [CONFIG, WEIGHTS])
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FileNotFoundError(f"{folder} has no {needed}, but {found}")
    with TensorFile(folder / WEIGHTS) as file:
        with naming(folder / CONFIG, "cannot be used"):
            config = _read_config(folder, file.metadata.get(TARGETS))
            plan = plan_of(model, config, "meta", from_file=True)
            lora = {layer.name: adapter for layer, adapter in plan if isinstance(adapter, LoRA)}
            if TARGETS in file.metadata and _patterns(config, lora) != (config.rank_pattern, config.alpha_pattern):
                raise ValueError("rank_pattern or alpha_pattern was changed, for parts of a layer")
        with naming(file.path, "cannot be used"):
            _check_tensors(file, model, plan)
            for layer, adapter in plan:
                adapter.to_empty(device=device_of(model))
                names = adapter.stored(layer.transposed)
                tensors = {name: file.read(f"{PREFIX}{layer.name}.{name}") for name in names}
                if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
                    raise ValueError(f"{PREFIX}{layer.name}.{bad[0]} has numbers that are not finite")
                adapter.read(tensors, layer.transposed)
                if _is_tied(model, layer, adapter) and not torch.equal(file.read(HEAD), tensors["weight"]):
                    raise ValueError(f"{HEAD} differs from the token embedding, but in this model they are one tensor")
    install(model, name, config, plan)
    return report(model)


def save_adapter(
    model: nn.Module,
    directory: PathLike,
    name: str | None = None,
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter, by default the active one, as peft's two files; the last argument is a key of peft's.

    Raises ValueError, having written nothing, if a number is not finite.
    """
    state = state_of(model)
    name = name or state.active
    if name not in state.configs:
        raise ValueError(f"there is no adapter {name!r} to save; the model has {listed(state.configs)}")
    directory, config = Path(directory), state.configs[name]
    slots = [(layer, layer.module.lora[name]) for layer in layers_of(model) if name in slot_of(layer.module)]
    tensors = _stored(model, slots)
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{bad[0]} has numbers that are not finite")
    lora = {layer.name: adapter for layer, adapter in slots if isinstance(adapter, LoRA)}
    transposed = any(layer.transposed.get("weight") for layer, adapter in slots if isinstance(adapter, LoRA))
    saved = [*config.modules_to_save, *(["lm_head"] if HEAD in tensors and "lm_head" not in lora else [])]
    values = _make_config(
        config, lora, transposed, modules_to_save=list(dict.fromkeys(saved)) or None,
        base_model_name_or_path=base_model_name_or_path,
        task_type=TASKS.get(getattr(model, "suffix", ""), "CAUSAL_LM"),
    )  # fmt: skip
    metadata = {TARGETS: json.dumps(config.target_modules)} if any(adapter.parts for adapter in lora.values()) else None
    with atomic_file(make_folder(directory) / CONFIG) as aside:  # the weights are replaced inside, so just before it
        write_json(aside, values)
        save_tensors(directory / WEIGHTS, tensors, metadata)


def _stored(model: nn.Module, adapters: Iterable[tuple[Layer, Any]]) -> dict[str, Tensor]:
    """Return what the file has. peft needs a second copy of an embedding that is the output projection as well."""
    tensors = {}
    for layer, adapter in adapters:
        for key, tensor in adapter.stored(layer.transposed).items():
            tensors[f"{PREFIX}{layer.name}.{key}"] = tensor.detach()
            if _is_tied(model, layer, adapter):
                tensors[HEAD] = tensor.detach()
    return tensors


def _is_tied(model: nn.Module, layer: Layer, adapter: Any) -> bool:
    return isinstance(adapter, Copy) and layer.is_embedding and getattr(model, "lm_head", model) is None


def _check_tensors(file: TensorFile, model: nn.Module, plan: Sequence[tuple[Layer, Any]]) -> None:
    found, expected = file.entries, _stored(model, plan)
    for layer, _ in plan:
        if (key := f"{PREFIX}{layer.name}.base_layer.weight") in found:  # peft adds the weight of lm_head
            expected[key] = float_weight(layer.module)
    for what, keys in (("is missing", expected.keys() - found.keys()), ("is unexpected", found.keys() - expected)):
        if keys:
            more = f" ({len(keys)} such tensors)" if len(keys) > 1 else ""
            raise ValueError(f"{min(keys)} {what}{more}")
    for key, tensor in sorted(expected.items()):
        if found[key].shape != tuple(tensor.shape):
            raise ValueError(
                f"{key} has shape {found[key].shape}, but this model needs {tuple(tensor.shape)}: the adapter was made "
                "for another base"
            )
        if not found[key].dtype.is_floating_point:
            raise ValueError(f"{key} is {found[key].dtype}, expected a floating-point dtype")
        if key.endswith(".base_layer.weight") and not torch.equal(file.read(key), tensor.cpu()):
            raise ValueError(f"{key} differs from that of the model: the adapter was made for another base")


def _read_config(folder: Path, targets: str | None = None) -> AdapterConfig:
    """Return the settings in a folder; targets: target_modules in JSON, where they are finer than peft's.

    Raises ValueError, naming the key, for an option that gptcore does not have, unless it is off.
    """
    values = read_json(folder / CONFIG)
    if (kind := values.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type is {kind!r}, expected 'LORA'")
    if (bias := values.pop("bias", "none")) != "none":
        raise ValueError(f"bias is {bias!r}, expected 'none': gptcore does not train biases beside an adapter")
    if (initial := values.get("init_lora_weights")) not in INITIALISED:
        raise ValueError(
            f"init_lora_weights is {initial!r}, which changes the weights of the base; convert the adapter to "
            "a plain LoRA with peft's path_initial_model_for_weight_conversion"
        )
    fields = [field.name for field in dataclasses.fields(AdapterConfig)]
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = RENAMED.get(key, key)
        if name in fields and key not in RENAMED.values():
            known[name] = value
        elif key not in IGNORED and value not in (None, False, [], {}):
            raise ValueError(f"{key!r:.60} is {value!r:.60}, an option that gptcore does not have")
    for name in ("modules_to_save", "trainable_token_indices"):
        known[name] = known.get(name) or []
    if isinstance(rows := known["trainable_token_indices"], dict):
        if len(rows) > 1 or not all(name.rpartition(".")[2] in EMBEDDINGS for name in rows):
            raise ValueError(f"trainable_token_indices is {rows!r:.60}, expected rows of the token embedding")
        known["trainable_token_indices"] = next(iter(rows.values()))
    if targets is not None:
        known["target_modules"] = json.loads(targets)
    defaults = dataclasses.asdict(AdapterConfig(alpha=8))  # peft's
    return from_json(AdapterConfig, defaults | known, folder / CONFIG)


def _make_config(config: AdapterConfig, adapters: Mapping[str, LoRA], transposed: bool, **more: Any) -> dict[str, Any]:
    """Return the contents of the file; adapters: those of the linear layers by name, `more`: further keys."""
    ranks, alphas = _patterns(config, adapters)
    if config.target_modules == "all-linear":
        targets = sorted(adapters)
    else:
        targets = sorted({name[:-2] if name[-2:] in (".q", ".k", ".v") else name for name in config.target_modules})
    return {
        "peft_type": "LORA", "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "use_rslora": config.rslora, "use_dora": config.dora, "fan_in_fan_out": transposed, "target_modules": targets,
        "trainable_token_indices": config.trainable_token_indices or None,
        "rank_pattern": ranks, "alpha_pattern": alphas, "init_lora_weights": True, "inference_mode": True, **more,
    }  # fmt: skip


def _patterns(config: AdapterConfig, adapters: Mapping[str, LoRA]) -> tuple[dict[str, int], dict[str, float]]:
    """Return peft's rank_pattern and alpha_pattern: parts of c_attn are blocks of one product of a higher rank."""
    parts = {name: len(adapter.parts) for name, adapter in adapters.items() if adapter.parts}
    ranks = {name: n * config.r for name, n in parts.items()}
    alphas = {name: config.alpha * (math.sqrt(n) if config.rslora else n) for name, n in parts.items()}
    return config.rank_pattern | ranks, config.alpha_pattern | alphas
