"""Public names of the exporters: GGUF for llama.cpp, folders for transformers."""

from gptcore.hf.gguf import DTYPES, export_gguf, export_hf
from gptcore.hf.gguf_adapter import export_gguf_adapter

__all__ = ["DTYPES", "export_gguf", "export_gguf_adapter", "export_hf"]
