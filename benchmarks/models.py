"""Models of the benchmarks: ours, the same in transformers, and the matrix products of both alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Limit, name_of, operand, pick
from gptcore import GPT, GPTConfig, ops
from gptcore.hf.pretrained import PREFIX, TRANSPOSED
from gptcore.ops.linear import uses_kernel
from gptcore.ops.registry import BACKENDS, FLOATS, Backend
from gptcore.training.optim import AdamW

NO_DROPOUT: Any = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # dropout would make the losses differ
SHAPE: Any = pick({"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 128}, {})
GPT2 = GPTConfig(**SHAPE, **NO_DROPOUT)
BATCH = pick((2, 16), (4, 256))


def transformers_gpt2(model: GPT) -> Any:
    """Return transformers' GPT2LMHeadModel with our weights. Skips the benchmark without transformers."""
    reason = 'transformers is not installed (pip install "gptcore[bench]")'
    transformers = pytest.importorskip("transformers", reason=reason)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_dict()))
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            state[PREFIX + name].copy_(tensor.t() if TRANSPOSED.fullmatch(name) else tensor)
    return theirs


def compute_gradients(model: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the gradients of a step and return the loss. bfloat16 with float32 weights means autocast."""
    with torch.autocast("cpu", dtype, enabled=dtype is not next(model.parameters()).dtype):
        only_loss = (
            {"return_logits": False} if isinstance(getattr(model, "_orig_mod", model), GPT) else {}
        )  # as in our Trainer
        loss: Tensor = model(input_ids=ids, labels=ids, **only_loss).loss
    loss.backward()
    return loss


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Make one step with either optimizer: loss, gradients, clipping to 1, update."""
    loss = compute_gradients(model, ids, dtype)
    if isinstance(optimizer, AdamW):
        optimizer.step(grad_scale=min(1.0, 1.0 / (optimizer.grad_norm() + 1e-6)))
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class Trainee:
    """A model in training on one batch; calling it makes a step."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, batch: tuple[int, int], dtype: torch.dtype,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.dtype, self.backend = model.train(), optimizer, dtype, backend
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(model.config.vocab_size, batch, generator=generator)
        self.losses: list[Tensor] = []

    def __call__(self) -> None:
        with ops.use(self.backend):
            self.losses.append(train_step(self.model, self.optimizer, self.ids, self.dtype))


def no_kernels(dtype: torch.dtype) -> str:
    """Register a backend whose attention, norms and GELU return their input, and return its name."""

    def layer_norm(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, out_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return total.to(out_dtype or total.dtype), total

    nothing: dict[str, Callable[..., Any]] = {
        "attention": lambda qkv, *rest: (qkv[:, :, 2], None),
        "layer_norm": layer_norm,
        "gelu": lambda x, bias, tanh: x,
    }
    ours = uses_kernel(dtype, training=True)
    nothing["linear"] = BACKENDS["cpu" if ours else "torch"].implementations["linear"]
    implementations = {**BACKENDS["cpu"].implementations, **nothing}
    BACKENDS["nothing"] = Backend("nothing", devices=("cpu",), dtypes=FLOATS, implementations=implementations)
    return "nothing"


ALL = "all of it"  # without transformers' steps in between, which make the next step allocate memory again
# Each part is left out together with those before it
PARTS = ["without AdamW and clipping", "also without casts", "also without attention, norms and GELU"]


def named(dtype: torch.dtype, weights: torch.dtype) -> str:
    if dtype is torch.float32:
        return name_of(dtype)
    return f"{name_of(dtype)} {'autocast' if weights is torch.float32 else 'weights'}"


def in_parts(
    config: GPTConfig, batch: tuple[int, int], dtype: torch.dtype, part: str, weights: torch.dtype = torch.float32
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a training step without some of its parts, and the whole step."""
    if part == "also without casts" and dtype is weights:
        pytest.skip(f"{named(dtype, weights)} has none")
    torch.manual_seed(0)
    model = GPT(config).train().to(weights)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(config.vocab_size, batch)
    less = model if part == PARTS[0] else copy.deepcopy(model).to(dtype)  # weights that need no casts
    backend = no_kernels(dtype) if part == PARTS[2] else None

    def gradients() -> None:
        with ops.use(backend):
            compute_gradients(less, ids, dtype)
        less.zero_grad()

    def whole() -> Tensor:
        return train_step(model, optimizer, ids, dtype)

    return (whole if part == ALL else gradients), whole


def difference(ours: Trainee, theirs: Trainee) -> float:
    """Return the maximum relative difference of the losses over the first eight steps. Asserts that it is small."""
    pairs = list(zip(ours.losses, theirs.losses, strict=False))[:8]
    assert pairs[-1][0] < pairs[0][0], "the loss does not fall"
    greatest = max(float(abs(a / b - 1)) for a, b in pairs)
    assert greatest < (1e-3 if ours.dtype is theirs.dtype is torch.float32 else 3e-2), pairs
    return greatest


def matmuls(config: GPTConfig, tokens: int, dtype: torch.dtype) -> Limit:
    """Return the limit of the matrix products of a training step: forward and both gradients of every linear layer.

    They write into preallocated buffers, without biases, casts and attention: a lower bound for the time of a step.
    Without instructions for bfloat16 they are made in float32, as ours are.
    """
    dtype = operand(dtype)
    C, V, inner = config.n_embd, config.vocab_size, config.n_inner or 4 * config.n_embd
    runs: list[tuple[int, Callable[[], None]]] = []
    for width, height, times in ((C, 3 * C, 0), (C, C, 0), (C, inner, 0), (inner, C, 0), (C, V, 1)):
        x, w, y = (torch.randn(shape).to(dtype) for shape in ((tokens, width), (height, width), (tokens, height)))
        dx, dw = torch.empty_like(x), torch.empty_like(w)

        def linear(x: Tensor = x, w: Tensor = w, y: Tensor = y, dx: Tensor = dx, dw: Tensor = dw) -> None:
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=dx)
            torch.mm(y.t(), x, out=dw)

        runs.append((times or config.n_layer, linear))

    def step() -> None:
        for times, linear in runs:
            for _ in range(times):
                linear()

    return Limit("its matmuls alone", step, 1, "step")
