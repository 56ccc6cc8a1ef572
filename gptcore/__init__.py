"""gptcore: fused kernels for GPT, and the thin model, trainer and tools that stand on them."""

import torch  # noqa: F401  (first, so that our kernels use PyTorch's OpenMP runtime)

from gptcore import _C, ops
from gptcore.config import GPTConfig
from gptcore.data.collator import DataCollatorForLanguageModeling, DataCollatorForTasks
from gptcore.data.datasets import TextDataset
from gptcore.heads import (
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForTokenClassification,
)
from gptcore.model import GPT
from gptcore.text.tokenizer import Tokenizer
from gptcore.training.trainer import Trainer, TrainingArguments

__version__ = str(_C.build_info()["version"])

__all__ = [
    "GPT",
    "DataCollatorForLanguageModeling",
    "DataCollatorForTasks",
    "GPTConfig",
    "GPTForMultipleChoice",
    "GPTForQuestionAnswering",
    "GPTForSequenceClassification",
    "GPTForTokenClassification",
    "TextDataset",
    "Tokenizer",
    "Trainer",
    "TrainingArguments",
    "ops",
]
