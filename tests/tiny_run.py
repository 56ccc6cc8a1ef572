"""A run of a few milliseconds a step, which the tests of checkpoints train, kill, damage and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.training.callbacks import TrainerCallback, read_log
from gptcore.training.trainer import Trainer, TrainingArguments

STEPS = 60
EXACT = ("model.safetensors", "optimizer.safetensors", "random_state.json")  # the same bytes from the same course


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def tiny_gpt() -> GPT:
    """A GPT with dropout, so that random state matters."""
    return GPT(GPTConfig(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def tiny_trainer(
    folder: Path,
    callbacks: tuple[TrainerCallback, ...] = (),
    make: Callable[[TrainingArguments], nn.Module] = lambda args: tiny_gpt(),
    **changes: Any,
) -> Trainer:
    """50 examples, so that epochs end in odd steps."""
    data = torch.randint(0, 32, (50, 8), generator=torch.Generator().manual_seed(0))
    args: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    args |= {"max_steps": STEPS, "logging_steps": 3, "eval_steps": 4, "save_steps": 2, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **args | changes)
    torch.manual_seed(1)
    return Trainer(make(arguments), arguments, data[:44], data[44:], collate, callbacks=callbacks)


def exact(path: Path) -> dict[str, str]:
    manifest = json.loads((path / "manifest.json").read_text())
    return {name: manifest[name]["sha256"] for name in EXACT}


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in read_log(folder / "log.jsonl")]
