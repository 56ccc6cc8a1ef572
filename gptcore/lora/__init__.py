"""Adapters for fine-tuning: LoRA, rsLoRA and DoRA on linear layers, and what is trained beside them, in peft's files.

    print(add_adapter(model, r=8, target_modules=["c_attn"]))    # the base is frozen; prints what is trained
    Trainer(model, ...).train()
    save_adapter(model, "adapter")                               # adapter_config.json, adapter_model.safetensors
    merge_adapter(model)                                         # into the weights; unmerge_adapter restores their bits

A model may have several adapters, of which `set_adapter` selects one. Their parameters are in a child module `lora` of
each layer that they change; those of the base keep their names. A layer may be of any class that has in_features and
out_features. What an adapter does to a layer is in layers.py, peft's files in files.py.
"""

from gptcore.lora.adapters import Report, add_adapter, merge_adapter, report, set_adapter, unmerge_adapter
from gptcore.lora.files import load_adapter, save_adapter

__all__ = [
    "Report",
    "add_adapter",
    "load_adapter",
    "merge_adapter",
    "report",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
