"""Training and decoding steps on a GPU, without one: no read-back, and how many kernels a step launches.

Tensors on the meta device and fake tensors have no values: whatever reads one back raises.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import GPT, GPTConfig, ops
from gptcore.generation.batch import Batch
from gptcore.generation.sampling import Settings
from gptcore.ops import native, registry
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


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made in it have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.living = {key: entry for key, entry in self.living.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return result


@pytest.fixture
def cuda_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend cuda take tensors on the meta device and fake ones: operators return what their fakes do."""
    for backend, values in {
        "cuda": {"devices": ("meta", "cuda"), "problem": lambda: None},
        "triton": {"problem": lambda: None},
    }.items():
        for name, value in values.items():
            monkeypatch.setitem(registry.BACKENDS[backend].__dict__, name, value)
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


# Of GPT-2 124M in bfloat16, 8 x 1024 tokens. layer_norm_backward and attention_backward launch two kernels each;
# linear_cross_entropy 19: 16 operators, below, the softmax of two chunks, and the mean.
FORWARD_BACKWARD = {
    "mm": 96, "addmm": 48, "sum": 49, "layer_norm_forward": 25, "layer_norm_backward": 25, "attention_forward": 12,
    "attention_backward": 12, "gelu_forward": 12, "gelu_backward": 12, "embedding": 2, "embedding_dense_backward": 2,
    "add": 3, "arange": 1, "constant_pad_nd": 1, "linear_cross_entropy": 1, "ones_like": 1, "mul_": 2,
}  # fmt: skip
# With float32 master weights: the norm, the clip factor, and for both groups of parameters the steps and one kernel.
CLIP_AND_UPDATE = {
    "_foreach_norm": 1, "stack": 1, "linalg_vector_norm": 1, "add": 1, "reciprocal": 1, "mul": 2, "clamp": 1, "abs": 1,
    "ne": 1, "eq": 1, "rsub": 3, "_to_copy": 3, "_foreach_add_": 2,
}  # fmt: skip


@pytest.mark.slow
def test_launches_of_a_training_step(cuda_on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt(12).bfloat16()
    ids = torch.zeros(8, 1024, dtype=torch.int64, device="meta")
    with ops.use("cuda"), Launches() as launches:
        model(ids, labels=ids, return_logits=False).loss.backward()
    assert launches.counts == FORWARD_BACKWARD
    with FakeTensorMode(), torch.no_grad():  # without autograd, which needs a GPU for CUDA tensors
        parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda")) for p in model.parameters()]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        matrices, vectors = ([p for p in parameters if (p.dim() > 1) == many] for many in (True, False))
        optimizer = AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], backend="cuda")
        for parameter in parameters:
            optimizer.init_state(parameter)
        updates: list[Any] = []
        kernels = SimpleNamespace(
            table=lambda *lists: ([[len(some)] for some in lists], lambda: [[0]]),
            step=lambda *a, **_: updates.append(a),
        )
        monkeypatch.setattr(native, "triton_module", lambda _: kernels)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # fake tensors have no pinned memory
        for _ in range(2):  # the first copies the table of addresses
            with Launches() as launches:
                norm = optimizer.global_norm()
                optimizer.step(grad_scale=clip_factor(norm, 1.0), found_inf=1.0 - torch.isfinite(norm).float())
    assert launches.counts == CLIP_AND_UPDATE
    assert len(updates) == 4


# Of a layer 4 weights and 4 biases, and their gradients; beside them, a gradient in the last norm. So of 12 layers 193;
# 264 before ops.layer_norm wrote in 16 bits what linear layers read
CASTS_IN_A_LAYER, CASTS_BESIDE = 16, 1


def test_autocast_casts_weights_and_no_activations() -> None:
    model = GPT(GPTConfig(vocab_size=32, n_positions=8, n_embd=16, n_layer=3, n_head=2))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with Launches() as launches:  # under a mode linear layers are PyTorch's, as on a GPU
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
    assert launches.counts["_to_copy"] == 3 * CASTS_IN_A_LAYER + CASTS_BESIDE
    assert launches.counts["layer_norm_backward"] == 7


def test_memory_and_launches_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPT-2, at 8 x 1024 tokens: what the Triton kernel and the matmuls around it take, beside PyTorch's formula."""
    module = sys.modules["gptcore.ops.linear_cross_entropy"]  # the name in the package is the function
    kernels = SimpleNamespace(forward=lambda *_: None, mean=lambda *_: None)
    monkeypatch.setattr(module.native, "triton_module", lambda _: kernels)
    monkeypatch.setattr(module._C, "check_storage", lambda _: None)
    x, weight = (torch.empty(rows, 768, device="meta", dtype=torch.bfloat16) for rows in (8192, 50257))
    targets = torch.empty(8192, dtype=torch.int64, device="meta")
    with torch.no_grad(), PeakMemory() as ours, Launches() as launches:
        gradients = module._forward_triton(x, weight, targets, torch.bfloat16, -100, True, True)
    assert [tensor.dtype for tensor in gradients] == [torch.float32, torch.bfloat16, torch.bfloat16]
    with PeakMemory() as theirs:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        module._linear_cross_entropy_torch(*leaves, targets, torch.bfloat16, -100).backward()
    assert ours.peak < 0.9e9
    assert theirs.peak - ours.peak > 3e9, (ours.peak, theirs.peak)
    assert launches.counts == {"mm": 8, "addmm_": 4, "copy_": 1, "add_": 1, "mul": 2}


# Launches of a decoding step: in each layer 2 layer norms, 4 products, attention, GELU, and the new keys and values
IN_A_LAYER, BESIDE, BESIDE_RAGGED = 9, 21, 33


@pytest.mark.parametrize(("lengths", "beside"), [((7, 7), BESIDE), ((7, 9), BESIDE_RAGGED)])
def test_launches_of_a_decoding_step(
    cuda_on_meta: None, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int], beside: int
) -> None:
    choose = Batch._choose
    rows = SimpleNamespace(tolist=lambda: [5, 5])
    monkeypatch.setattr(Batch, "_choose", lambda self, logits: choose(self, logits) is not None and rows)
    with ops.use("cuda"):
        batch = Batch(gpt(3).bfloat16())
        for length in lengths:
            batch.add([3] * length, Settings(max_new_tokens=4))
        for _ in range(3):
            with Launches() as launches:
                batch.step()
    assert launches.counts.total() == 3 * IN_A_LAYER + beside, launches.counts


@pytest.mark.parametrize("lengths", [(7, 7), (7, 9)])
def test_decoding_reads_the_tokens_alone(
    cuda_on_meta: None, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        for length in lengths:
            batch.add(
                [3] * length, Settings(max_new_tokens=4, repetition_penalty=1.1, min_new_tokens=2, eos_token_id=0)
            )
        tokens = [batch.step() for _ in range(4)]
    assert [[token.finish_reason for token in step] for step in tokens] == [[None, None]] * 3 + [["length"] * 2]
    assert [tuple(row.shape) for row in chosen] == [(2,)] * 4
    assert {row.device.type for row in chosen} == {"meta"}
