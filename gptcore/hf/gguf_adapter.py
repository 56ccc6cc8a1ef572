"""Write an adapter as a GGUF file that llama.cpp adds to a model: `llama-server --lora`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcore.files import PathLike, atomic_file
from gptcore.hf.gguf import check_published
from gptcore.hf.gguf_weights import gguf_name
from gptcore.lora.adapters import layers_of, slot_of, state_of
from gptcore.lora.layers import LoRA

if TYPE_CHECKING:
    from gptcore.model import GPT

PREFIX = "transformer."


def export_gguf_adapter(model: GPT, path: PathLike, name: str = "default") -> None:
    """Write an adapter of the model in float32; the file is whole or absent.

    llama.cpp has low-rank products alone, and one alpha: scale alpha / rank. Other scales go into the matrices B.
    Raises ValueError for an adapter with anything else, such as DoRA or trained tokens, and for a model that llama.cpp
    does not have; ImportError without the package gguf.
    """
    check_published(model.config)
    config = state_of(model).configs.get(name)
    if config is None:
        raise ValueError(f"there is no adapter {name!r} to export; the model has {list(state_of(model).configs)}")
    try:
        import gguf
    except ImportError as error:
        raise ImportError('writing GGUF needs the package gguf: pip install "gptcore[export]"') from error
    tensors = {}
    for layer in layers_of(model):
        if name not in slot_of(layer.module):
            continue
        adapter = layer.module.lora[name]
        if not isinstance(adapter, LoRA) or adapter.magnitude is not None:
            kind = "DoRA" if isinstance(adapter, LoRA) else "trained weights or tokens"
            raise ValueError(
                f"the adapter has {kind} in {layer.name}, but llama.cpp's adapters are low-rank products alone; "
                "merge it with merge_adapter, and export the model"
            )
        place = gguf_name(f"{layer.name.removeprefix(PREFIX)}.weight")
        factor = adapter.scale * len(adapter.A) / config.alpha
        tensors[f"{place}.lora_a"], tensors[f"{place}.lora_b"] = adapter.A, adapter.rows() * factor
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{bad[0]} has numbers that are not finite")
    with atomic_file(path) as aside:
        writer = gguf.GGUFWriter(aside, "gpt2")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config.alpha)
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.detach().float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
