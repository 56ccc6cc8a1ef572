"""Fully sharded data parallel training by PyTorch's FSDP2: each process holds a part of weights, gradients and moments.

The sums of gradients are those of the backend, so the bits of a run depend on the number of processes. Checkpoints are
those of one process: rank 0 writes and reads them, and asks the others for one tensor at a time.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.training.arguments import TrainingArguments
from gptcore.training.checkpoint import named_tensors, own_name
from gptcore.training.distributed import Processes
from gptcore.training.optim import AdamW


def shard(model: nn.Module, args: TrainingArguments, processes: Processes) -> None:
    """Leave in each process its part of the weights of rank 0; a block's are gathered while it computes."""
    if hasattr(model, "adapters"):
        raise ValueError("parallel is 'fsdp', which cannot shard a model with adapters; leave it out, or merge them")
    if processes.count == 1:
        raise ValueError("parallel is 'fsdp', but there is 1 process; start several with torchrun, or leave it out")
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise RuntimeError(f"parallel 'fsdp' needs a newer PyTorch than {torch.__version__}; 2.13 is tested")
    # Blocks return views, and FSDP cannot know that nothing modifies them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if not isinstance(model, FSDPModule):
        processes.broadcast(list(named_tensors(model).values()))
        narrow = torch.bfloat16 if args.bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32 if args.bf16 else None)
        lists = [
            blocks for module in model.modules() if isinstance(blocks := getattr(module, "h", None), nn.ModuleList)
        ]
        for module in [*itertools.chain(*lists), model]:  # of a model without GPT's blocks, all is gathered at once
            fully_shard(module, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: each loss has its weight of all targets
            module.set_force_sum_reduction_for_comms(True)


class ShardedGradient:
    """The gradient of a step where FSDP adds it up, in the last pass; see GradientSum for its methods.

    Each process makes as many passes as the others, if need be with weight 0, because FSDP communicates in each.
    """

    in_step = True

    def __init__(self, model: Any, processes: Processes, micro_batches: int) -> None:
        self.model, self.processes, self.block = model, processes, processes.block(micro_batches)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._loss: Tensor | float = 0.0
        self.passes = max(len(processes.block(micro_batches, rank)) for rank in range(processes.count))

    def clear(self) -> None:
        self._loss, self._left = 0.0, self.passes
        self.model.zero_grad()
        self.model.set_requires_gradient_sync(self.passes == 1)

    def add(self, loss: Tensor | None) -> None:
        self._loss, self._left = self._loss + (0.0 if loss is None else loss.detach().float()), self._left - 1
        self.model.set_requires_gradient_sync(self._left == 1)

    def finish(self, stop: int, device: torch.device) -> tuple[Tensor, int]:
        self.processes.add(loss := torch.as_tensor(self._loss, device=device).clone())
        return loss, max(flag for (flag,) in self.processes.gather([stop]))


class Shards:
    """The weights and the optimizer's state of a sharded model, for rank 0 to write and to read as whole tensors."""

    def __init__(self, model: nn.Module, optimizer: AdamW, processes: Processes) -> None:
        self.optimizer, self.processes = optimizer, processes
        self._tensors = named_tensors(model)  # detached
        self._parameters = {own_name(name): parameter for name, parameter in model.named_parameters()}

    def whole(self, name: str, key: str | None = None) -> Tensor:
        """Return a parameter or buffer, or its state `key` in the optimizer; in rank 0, while the others `serve`."""
        return self._ask("whole", name, key, None)

    def fill(self, name: str, key: str | None, value: Tensor) -> None:
        """Overwrite the same, in all processes."""
        self._ask("fill", name, key, value)

    def serve(self, request: tuple[str, str, str | None]) -> None:
        """Do in another process what rank 0 asked for."""
        self._exchange(*request, None)

    def _ask(self, what: str, name: str, key: str | None, value: Tensor | None) -> Tensor:
        self.processes.ask((what, name, key))
        return self._exchange(what, name, key, value)

    def _exchange(self, what: str, name: str, key: str | None, value: Tensor | None) -> Tensor:
        tensor: Any = self._tensors[name] if key is None else self.optimizer.init_state(self._parameters[name])[key]
        sharded = hasattr(tensor, "to_local")
        if what == "whole":
            return tensor.full_tensor() if sharded else tensor
        if value is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if sharded:
            from torch.distributed.tensor import distribute_tensor

            mine = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements).to_local()
            tensor.to_local().copy_(mine)
        else:
            tensor.copy_(value)
            self.processes.broadcast([tensor])
        return value
