"""gptcore: fused kernels for GPT, and the thin model, trainer and tools that stand on them."""

from gptcore import ops
from gptcore.config import GPTConfig
from gptcore.data import DataCollatorForLanguageModeling, TextDataset
from gptcore.model import GPT
from gptcore.tokenizer import Tokenizer
from gptcore.trainer import Trainer, TrainingArguments

__all__ = [
    "GPT",
    "DataCollatorForLanguageModeling",
    "GPTConfig",
    "TextDataset",
    "Tokenizer",
    "Trainer",
    "TrainingArguments",
    "ops",
]
