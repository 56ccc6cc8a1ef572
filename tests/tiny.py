"""A GPT and a trainer small enough to train in milliseconds, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import read_log
from gptcore.training.trainer import Trainer

Batch = dict[str, torch.Tensor]


def collate(rows: list[torch.Tensor]) -> Batch:
    """Rows of different lengths, padded on the right."""
    length = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (0, length - len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def rows(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(0, 32, (length,), generator=generator) for length in lengths]


def tiny_model(dropout: float = 0.1, **changes: Any) -> GPT:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT(GPTConfig(**(shape | drops | changes)))


def tiny_trainer(
    folder: Path, callbacks: Any = (), model: nn.Module | None = None, data: Any = None, **changes: Any
) -> Trainer:
    args: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 0}
    args |= {"logging_steps": 1, "disable_tqdm": True}
    data = rows(22) if data is None else data
    return Trainer(
        tiny_model() if model is None else model,
        TrainingArguments(str(folder), **args | changes),
        data,
        rows(10, seed=9),
        collate,
        callbacks=callbacks,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if k not in ("tokens_per_second", "mfu")}
        for entry in read_log(folder / "log.jsonl")
    ]
