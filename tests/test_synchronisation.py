"""Training and decoding steps on a GPU, without one: no read-back, and how many kernels a step launches.

Tensors on the meta device and fake tensors have no values: whatever reads one back raises.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import GPT, GPTConfig, ops
from gptcore.generation.batch import Batch
from gptcore.generation.sampling import Settings
from gptcore.ops import registry
from gptcore.training.optim import AdamW, clip_factor

# Operators that launch no kernel: they return views, allocate, or ask for a dtype
FREE = {
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "detach", "device", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute", "promote_types",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsafe_split", "unsqueeze",
    "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel or several. A list operator (_foreach, fused) counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture
def cuda_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend cuda take tensors on the meta device and fake ones: operators return what their fakes do."""
    backend = registry.BACKENDS["cuda"]
    for name, value in {"devices": ("meta", "cuda"), "problem": lambda: None}.items():
        monkeypatch.setitem(backend.__dict__, name, value)
    monkeypatch.setattr(registry, "VERIFIED", [])


def gpt(n_layer: int, dropout: float = 0.0) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(n_layer=n_layer, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("given", ["", "attention_mask", "cu_seqlens"])
def test_forward_and_backward_read_nothing_back(cuda_on_meta: None, backend: str, given: str) -> None:
    model = gpt(2, dropout=0.1).bfloat16()
    ids = torch.zeros(2, 64, dtype=torch.int64, device="meta")
    inputs = {"attention_mask": torch.ones_like(ids), "cu_seqlens": torch.zeros(4, dtype=torch.int32, device="meta")}
    with ops.use(backend), Launches():  # under a mode operators call their fakes
        model(ids, labels=ids, return_logits=False, **{k: v for k, v in inputs.items() if k == given}).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Of GPT-2 124M in bfloat16, 8 x 1024 tokens. layer_norm_backward and attention_backward launch two kernels each.
FORWARD_BACKWARD = {
    "mm": 99, "addmm": 48, "sum": 50, "_to_copy": 102, "layer_norm_forward": 25, "layer_norm_backward": 25,
    "attention_forward": 12, "attention_backward": 12, "gelu_forward": 12, "gelu_backward": 12, "embedding": 2,
    "embedding_dense_backward": 2, "add": 3, "div": 2, "arange": 1, "constant_pad_nd": 1, "_log_softmax": 1,
    "nll_loss_forward": 1, "ne": 1, "clamp": 1, "ones_like": 1, "nll_loss_backward": 1, "_log_softmax_backward_data": 1,
}  # fmt: skip
CLIP_AND_UPDATE = 70  # with float32 master weights


@pytest.mark.slow
def test_launches_of_a_training_step(cuda_on_meta: None) -> None:
    model = gpt(12).bfloat16()
    ids = torch.zeros(8, 1024, dtype=torch.int64, device="meta")
    with ops.use("cuda"), Launches() as launches:
        model(ids, labels=ids, return_logits=False).loss.backward()
    assert launches.counts == FORWARD_BACKWARD
    with FakeTensorMode(), torch.no_grad():  # without autograd, which needs a GPU for CUDA tensors
        parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda")) for p in model.parameters()]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = AdamW(parameters, backend="torch")
        for parameter in parameters:
            optimizer.init_state(parameter)
        with Launches() as launches:
            norm = optimizer.global_norm()
            optimizer.step(grad_scale=clip_factor(norm, 1.0), found_inf=1.0 - torch.isfinite(norm).float())
    assert 0 < launches.counts.total() <= CLIP_AND_UPDATE, launches.counts


def test_decoding_reads_the_tokens_alone(cuda_on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths read cu_seqlens as well, once, when they are added."""
    chosen: list[torch.Tensor] = []

    class Row:
        def __init__(self, tokens: torch.Tensor) -> None:
            chosen.append(tokens)

        def tolist(self) -> list[int]:
            return [5] * len(chosen[-1])

    choose = Batch._choose
    monkeypatch.setattr(Batch, "_choose", lambda self, logits: Row(choose(self, logits)))
    with ops.use("cuda"), Launches():
        batch = Batch(gpt(2).bfloat16())
        for length in (7, 7):
            batch.add(
                [3] * length, Settings(max_new_tokens=4, repetition_penalty=1.1, min_new_tokens=2, eos_token_id=0)
            )
        tokens = [batch.step() for _ in range(4)]
    assert [[token.finish_reason for token in step] for step in tokens] == [[None, None]] * 3 + [["length"] * 2]
    assert [tuple(row.shape) for row in chosen] == [(2,)] * 4
    assert {row.device.type for row in chosen} == {"meta"}
