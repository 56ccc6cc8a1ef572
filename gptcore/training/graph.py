"""Forward and backward pass as CUDA graphs: the host launches a graph instead of some 300 kernels.

A graph repeats what was recorded, on the same memory: tensors that change from pass to pass are copied into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer

WARM_UP = 3  # passes before a shape is recorded, as in PyTorch's documentation of CUDA graphs
SHAPES = 8  # graphs at most: each has a copy of the gradients


class GraphedPass:
    """Calls trainer.backward_of, from the fourth batch of a shape on as a CUDA graph. Both give the same bits."""

    def __init__(self, trainer: Trainer) -> None:
        self.run, self.parameters = trainer.backward_of, trainer.gradients.parameters
        self.copies = trainer.args.gradient_accumulation_steps > 1  # else gradients are read before the next pass
        self.weight = torch.zeros((), dtype=torch.float64, device=trainer.device)
        self.passes: dict[str, int] = {}  # by the shape of a batch
        self.recorded: dict[str, tuple[Any, dict[str, Any], Tensor, list[Tensor | None]]] = {}
        self.side, self.pool = torch.cuda.Stream(trainer.device), torch.cuda.graph_pool_handle()

    def __call__(self, batch: dict[str, Any], weight: float) -> Tensor:
        """Return the loss, and leave the gradients in .grad. Raises ValueError for more shapes than SHAPES."""
        inputs = {name: value for name, value in batch.items() if name != "num_targets"}
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        key = str({name: (*v.shape, v.dtype) if name in tensors else v for name, v in inputs.items()})
        self.passes[key] = self.passes.get(key, 0) + 1
        if len(self.passes) > SHAPES:
            raise ValueError(
                f"cuda_graph=True records a graph for each shape of a batch, expected at most {SHAPES}, but {key} is "
                "one more; pad or cut examples to one length, or leave cuda_graph out"
            )
        self.weight.fill_(weight)
        if self.passes[key] <= WARM_UP:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                loss = self.run(inputs, self.weight)
            torch.cuda.current_stream().wait_stream(self.side)
            return loss
        if key not in self.recorded:
            static = inputs | {name: tensor.clone() for name, tensor in tensors.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                loss = self.run(static, self.weight)
            self.recorded[key] = graph, static, loss.detach(), [parameter.grad for parameter in self.parameters]
        graph, static, loss, gradients = self.recorded[key]
        for name, tensor in tensors.items():
            static[name].copy_(tensor)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone() if self.copies and gradient is not None else gradient
        return loss.clone()


def check(device: torch.device, model: nn.Module) -> None:
    """Raise ValueError for what a CUDA graph cannot repeat."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs an NVIDIA GPU, but the model is on {device}; leave cuda_graph out")
    for name, module in model.named_modules():
        if getattr(module, "attn_pdrop", 0.0):
            raise ValueError(
                f"cuda_graph=True would drop the same attention weights in every step, but {name}.attn_pdrop is "
                f"{module.attn_pdrop}, expected 0"
            )
