"""A model in a GGUF file of architecture gpt2, ours or llama.cpp's: its config, and its weights under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcore.config import GPTConfig
from gptcore.files import PathLike, entry, naming
from gptcore.hf.gguf_file import GGUFFile
from gptcore.ops.quantized_linear import BLOCK, BYTES, dequantize
from gptcore.tensor_file import Entry, parts

# Our names and llama.cpp's. Its matrices are (out, in) as ours are; GGUF itself lists the lengths the other way round.
NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OUR_NAMES = {theirs: ours for ours, theirs in (NAMES | LAYER_NAMES).items()}
_LAYERS = re.compile(r"(wte|lm_head|h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))\.weight")


def gguf_name(ours: str) -> str:
    """Return llama.cpp's name of a weight."""
    module, _, kind = ours.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, layer, part = module.split(".", 2)  # h.3.attn.c_attn
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def our_name(theirs: str) -> str:
    """Return our name of a weight; llama.cpp's if we have no such weight."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", theirs)
    if found is None or found[2] not in _OUR_NAMES:
        return theirs
    layer, ours = found[1], _OUR_NAMES[found[2]]
    if (layer is None) != (ours in NAMES):
        return theirs
    return f"{ours}.{found[3]}" if layer is None else f"h.{int(layer)}.{ours}.{found[3]}"


class GGUFWeights(GGUFFile):
    """The weights of a gpt2 under our names, in their blocks, or decoded to float32 where `in_blocks` is false.

    `kinds` has the kinds of those that are read in blocks: of linear layers and of the embedding. `dtype` is that of
    the embedding, and float32 if any weights are in blocks; vectors are float32 in every file.
    """

    def __init__(self, path: PathLike, in_blocks: bool) -> None:
        super().__init__(path)
        try:
            with naming(path, "is not a gpt2 that gptcore reads"):
                self._read_names(in_blocks)
        except BaseException:
            self.close()
            raise

    def _read_names(self, in_blocks: bool) -> None:
        if (found := entry(self.metadata, "general.architecture", str, self.path)) != "gpt2":
            raise ValueError(f"its general.architecture is {found!r:.60}, expected 'gpt2'")
        kinds = {our_name(name): kind for name, kind in self.kinds.items()}
        count = len(self.entries)
        self.entries = {our_name(name): found for name, found in self.entries.items()}
        if len(self.entries) < count:
            raise ValueError("two of its tensors are the same weight, such as blk.0 and blk.00")
        if "wte.weight" not in self.entries:
            raise ValueError("it has no token_embd.weight")
        self._raw = dict(self.entries)
        self.kinds = {name: kind for name, kind in kinds.items() if in_blocks and _LAYERS.fullmatch(name)}
        self._decoded = {name: kind for name, kind in kinds.items() if name not in self.kinds}
        self.dtype = torch.float32 if kinds else self.entries["wte.weight"].dtype
        for name, kind in self._decoded.items():
            _, (rows, bytes), offset = self.entries[name]
            self.entries[name] = Entry(torch.float32, (rows, bytes // BYTES[kind] * BLOCK), offset)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor. Raises ValueError for a block whose scale is not finite."""
        if name in self._decoded:
            return self.rows(name, 0, self.entries[name].shape[0])
        whole = super().read(name)
        if name in self.kinds:
            scales = whole.unflatten(1, (-1, BYTES[self.kinds[name]]))[..., :2].contiguous().view(torch.float16)
            if not scales.isfinite().all():
                raise ValueError(f"{self.path}: {name} has blocks with a scale that is not finite")
        return whole

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return tensor[start:stop] for 0 <= start <= stop <= rows."""
        if name not in self._decoded:
            return super().rows(name, start, stop)
        _, (_, bytes), offset = self._raw[name]
        blocks = self._fill(torch.empty(stop - start, bytes, dtype=torch.uint8, device="cpu"), offset + start * bytes)
        return dequantize(blocks, self._decoded[name])

    def config(self, overrides: Mapping[str, Any]) -> GPTConfig:
        """Return the config that the metadata describe, with some settings replaced."""
        with naming(self.path, "cannot be used"):
            values = self.metadata
            if len(shape := self.entries["wte.weight"].shape) != 2:
                raise ValueError(f"its token_embd.weight has shape {shape}, expected a matrix")
            epsilon = entry(values, "gpt2.attention.layer_norm_epsilon", float, self.path)
            settings: dict[str, Any] = {
                "vocab_size": shape[0],
                "tie_word_embeddings": self._is_tied(),
                "layer_norm_epsilon": float(str(np.float32(epsilon))),  # 1e-5, not the nearest float32
            }
            for ours, theirs in {
                "n_positions": "context_length", "n_embd": "embedding_length", "n_layer": "block_count",
                "n_head": "attention.head_count", "n_inner": "feed_forward_length",
            }.items():  # fmt: skip
                settings[ours] = entry(values, f"gpt2.{theirs}", int, self.path)
            if settings["n_inner"] == 4 * settings["n_embd"]:
                settings["n_inner"] = None
            for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
                key = f"tokenizer.ggml.{theirs}_token_id"
                settings[f"{name}_token_id"] = entry({key: None, **values}, key, int | None, self.path)
            return GPTConfig(**{**settings, **overrides})

    def _is_tied(self) -> bool:
        """Return whether the output projection is the token embedding: absent, or a copy of it."""
        if "lm_head.weight" not in self.entries:
            return True
        head, wte = self._raw["lm_head.weight"], self._raw["wte.weight"]
        return head[:2] == wte[:2] and all(
            torch.equal(self.rows("lm_head.weight", start, stop), self.rows("wte.weight", start, stop))
            for start, stop in parts(wte.shape, wte.dtype.itemsize)
        )
