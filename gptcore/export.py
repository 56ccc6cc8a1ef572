"""Public names of the exporters: GGUF for llama.cpp, folders for transformers."""

from gptcore.hf.gguf import DTYPES, export_gguf, export_hf

__all__ = ["DTYPES", "export_gguf", "export_hf"]
