"""GPT-2 124M training steps with a LoRA adapter of rank 8 on c_attn, against peft on transformers' model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measure import FORM
from benchmarks.models import BATCH, GPT2, Trainee, difference, named, transformers_gpt2
from gptcore import GPT
from gptcore.lora import add_adapter, save_adapter
from gptcore.training.optim import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_lora(dtype: torch.dtype, compare: Callable[..., None]) -> None:
    peft = pytest.importorskip("peft", reason='peft is not installed (pip install "gptcore[test]")')
    torch.manual_seed(0)
    model = GPT(GPT2)
    other = transformers_gpt2(model)
    add_adapter(model, r=8, alpha=16, target_modules=["c_attn"])
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        wrapped = peft.PeftModel.from_pretrained(other, folder, is_trainable=True)
    ours, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (model, wrapped))
    extra: dict[str, Any] = {"tokens": BATCH[0] * BATCH[1]}
    pair = (
        Trainee(model, AdamW(ours, lr=1e-3), BATCH, dtype),
        Trainee(wrapped, torch.optim.AdamW(theirs, lr=1e-3, fused=True), BATCH, dtype),
    )
    case = "r 8 on c_attn, batch {} x {}".format(*BATCH)
    compare(f"GPT-2 124M LoRA step {named(dtype, torch.float32)}", case, *pair, against="peft", extra=extra)
    if FORM != "toy":
        extra["loss difference"] = difference(*pair)
