"""Fully sharded data parallel training by PyTorch's FSDP2: each process holds a part of weights, gradients and moments.

The sums of gradients are those of the backend, so the bits of a run depend on the number of processes. Checkpoints are
those of one process: rank 0 writes and reads them, and asks the others for one tensor at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptcore.files import PathLike
from gptcore.hf.pretrained import NoInitialization, read_tensors
from gptcore.lora.adapters import initialise_adapters
from gptcore.training import distributed
from gptcore.training.arguments import TrainingArguments
from gptcore.training.checkpoint import named_tensors, own_name
from gptcore.training.distributed import Processes
from gptcore.training.optim import AdamW


def sharded_model(
    make: Callable[[], nn.Module],
    args: TrainingArguments,
    device: torch.device | str,
    init_from: PathLike | None = None,
) -> nn.Module:
    """Return the model that `make` builds, sharded, for a Trainer with these args; no process ever holds all of it.

    make: is called on the meta device; it may add adapters, which start as add_adapter says.
    init_from: model folder or GGUF file of the weights, which rank 0 reads one by one. None: rank 0 draws them one by
        one, with the bits that make() would have there, by `reset_parameters` of its layers and its own `init_weights`.

    Raises ValueError for a model with buffers, as quantized ones have, or with weights that nothing initialises.
    """
    processes, device = distributed.join(torch.device(device)), torch.device(device)
    with torch.device("meta"), NoInitialization():
        model = make()
    if any(True for _ in model.buffers()):
        raise ValueError(f"a {type(model).__name__} with buffers cannot be built in parts: give it whole to Trainer")
    layers = [layer for layer in model.modules() if hasattr(layer, "reset_parameters")]
    known = {id(tensor) for layer in layers for tensor in layer.parameters()}
    left = [name for name, tensor in model.named_parameters() if id(tensor) not in known]
    if init_from is None and left and not hasattr(model, "init_weights"):
        raise ValueError(f"{left[0]} belongs to no layer with reset_parameters, and the model has no init_weights")
    shard(model, args, processes, device)
    model.to_empty(device=device)
    if init_from is not None:
        shards = Shards(model, None, processes)

        def fill() -> None:
            for name, tensor in read_tensors(model, init_from, next(model.parameters()).dtype):  # type: ignore[arg-type]
                shards.fill(name, None, tensor)

        processes.first(fill, shards.serve)
    from torch.distributed.tensor.experimental import implicit_replication  # of the numbers of an adapter's rows

    adapters = {id(tensor) for name, tensor in model.named_parameters() if "lora" in name.split(".")}
    with torch.no_grad(), implicit_replication():
        if init_from is None:
            with _WholeInitialization(processes.rank, adapters):
                for layer in layers:  # what a later function overwrites was drawn nevertheless
                    layer.reset_parameters()  # type: ignore[operator]
                if hasattr(model, "init_weights"):
                    model.init_weights()  # type: ignore[operator]
        with _WholeInitialization(processes.rank):
            initialise_adapters(model)
    return model


class _WholeInitialization(TorchFunctionMode):
    """Initialise each sharded tensor as a whole one on rank 0, by its generator, and scatter the result.

    later: ids of tensors that are not there yet in a model built whole.
    """

    DRAWS = (Tensor.normal_, Tensor.uniform_)

    def __init__(self, rank: int, later: Set[int] = frozenset()) -> None:
        self.rank, self.later = rank, later

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = getattr(func, "__module__", None) == "torch.nn.init" or func in self.DRAWS
        tensor = args[0] if args else kwargs.get("tensor")
        if not draws or not hasattr(tensor, "to_local"):
            return func(*args, **kwargs)
        if id(tensor) in self.later:
            return tensor
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if self.rank == 0:
            func(whole, *args[1:], **{name: value for name, value in kwargs.items() if name != "tensor"})
        _scatter(whole, tensor)
        return tensor


def _scatter(whole: Tensor, tensor: Any) -> None:
    """Overwrite a sharded tensor with the values of a whole one of rank 0."""
    from torch.distributed.tensor import distribute_tensor

    mine = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.to_local().copy_(mine.to_local())


def shard(model: nn.Module, args: TrainingArguments, processes: Processes, device: torch.device) -> None:
    """Leave in each process its part of the weights of rank 0; a block's are gathered while it computes."""
    if processes.count == 1:
        raise ValueError("parallel is 'fsdp', but there is 1 process; start several with torchrun, or leave it out")
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise RuntimeError(f"parallel 'fsdp' needs a newer PyTorch than {torch.__version__}; 2.13 is tested")
    # Blocks return views, and FSDP cannot know that nothing modifies them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if not isinstance(model, FSDPModule):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (processes.count,))
        processes.broadcast([tensor for tensor in named_tensors(model).values() if not tensor.is_meta])
        narrow = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=None if narrow is None else torch.float32)
        lists = [found for module in model.modules() if isinstance(found := getattr(module, "h", None), nn.ModuleList)]
        blocks = list(itertools.chain(*lists))
        if args.torch_compile and not blocks:
            kind = type(model).__name__
            raise ValueError(f"torch_compile with parallel 'fsdp' compiles the blocks model.h, but {kind} has none")
        for module in [*blocks, model]:  # of a model without GPT's blocks, all is gathered at once
            if args.torch_compile and module is not model:
                module.compile()  # without FSDP's hooks, which communicate
            fully_shard(module, mesh=mesh, mp_policy=policy)
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

    def __init__(self, model: nn.Module, optimizer: AdamW | None, processes: Processes) -> None:
        self.optimizer, self.processes = optimizer, processes
        self._tensors = named_tensors(model)  # detached
        self._parameters = {own_name(name): parameter for name, parameter in model.named_parameters()}

    def whole(self, name: str, key: str | None = None) -> Tensor:
        """Return a parameter or buffer, or its state `key` in the optimizer; in rank 0, while the others `serve`."""
        return self._ask("whole", name, key, None)

    def fill(self, name: str, key: str | None, value: Tensor) -> None:
        """Overwrite the same, in all processes."""
        self._ask("fill", name, key, value)

    @contextlib.contextmanager
    def whole_adapters(self, model: nn.Module) -> Iterator[None]:
        """Put whole tensors in place of the sharded ones of adapters, in rank 0, which others `serve` meanwhile."""
        own = [
            (module, key, parameter, own_name(f"{place}.{key}"))
            for place, module in model.named_modules()
            if "lora" in place.split(".")
            for key, parameter in module.named_parameters(recurse=False)
        ]
        try:
            for module, key, parameter, name in own:
                module._parameters[key] = nn.Parameter(self.whole(name), parameter.requires_grad)
            yield
        finally:
            for module, key, parameter, _ in own:
                module._parameters[key] = parameter

    def serve(self, request: tuple[str, str, str | None]) -> None:
        """Do in another process what rank 0 asked for."""
        self._exchange(*request, None)

    def _ask(self, what: str, name: str, key: str | None, value: Tensor | None) -> Tensor:
        self.processes.ask((what, name, key))
        return self._exchange(what, name, key, value)

    def _exchange(self, what: str, name: str, key: str | None, value: Tensor | None) -> Tensor:
        if key is None:
            tensor: Any = self._tensors[name]
        else:
            assert self.optimizer is not None
            tensor = self.optimizer.init_state(self._parameters[name])[key]
        sharded = hasattr(tensor, "to_local")
        if what == "whole":
            return tensor.full_tensor() if sharded else tensor
        if value is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if sharded:
            _scatter(value, tensor)
        else:
            tensor.copy_(value)
            self.processes.broadcast([tensor])
        return value
