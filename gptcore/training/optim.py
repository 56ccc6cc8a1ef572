"""AdamW that updates all parameters in one pass over memory, with gradient clipping folded in.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101), algorithm 2. State and state
dict are those of torch.optim.AdamW: each loads the other's. Parameters of 16 bits have a float32 copy in the state, as
Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740), section 3.1, keep one.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.weak import WeakIdKeyDictionary

from gptcore import _C
from gptcore.ops import native, registry
from gptcore.ops.operation import Operation, Sample
from gptcore.training.arguments import TrainingArguments
from gptcore.training.gradients import buckets

Group = dict[str, Any]
Implementation = Callable[..., Any]


class Update(NamedTuple):
    """The step of the parameters of a group that have the same device and dtype: the tensors of each, and settings."""

    parameters: list[Tensor]
    masters: list[Tensor]  # empty if the parameters are in float32
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    group: Group
    grad_scale: float | Tensor
    found_inf: Tensor | None


class AdamW(torch.optim.Optimizer):
    """For each parameter, with g = grad_scale x gradient, after t steps:

        exp_avg     <-  beta1 exp_avg + (1 - beta1) g
        exp_avg_sq  <-  beta2 exp_avg_sq + (1 - beta2) g^2
        parameter   <-  (1 - lr weight_decay) parameter
                        - lr / (1 - beta1^t) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

    A step with the gradient's norm clipped to max_norm reads the gradients twice and writes them never:

        norm = optimizer.grad_norm()
        optimizer.step(grad_scale=min(1.0, max_norm / (norm + 1e-6)))

    Of a parameter in bfloat16 or float16 the state has a `master` in float32: that is what is updated, with moments in
    float32, and the parameter is its rounding. Updates are often less than half of the last of 16 bits, and would
    be lost without it. Elements of a parameter that differ from their rounded master, because other weights were
    loaded, are where the update begins.

    Settings are torch.optim.AdamW's; it has no amsgrad, maximize, capturable or differentiable. Backends are those of
    gptcore.ops: `cpu` for contiguous parameters in float32, bfloat16 or float16; `torch` for all.

    Raises ValueError for settings out of range and for parameters that are not of a floating-point dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        backend: str | None = None,
    ) -> None:
        self.backend = backend
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: Group) -> None:
        _check({**self.defaults, **param_group})
        _plain("add_param_group")(self, param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.dtype.is_floating_point:
                self.param_groups.pop()
                raise ValueError(f"a parameter is {parameter.dtype}, expected a floating-point dtype")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict, deepcopy and pickle end here
        for group in state["param_groups"]:
            _check(group)
        super().__setstate__(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _plain("zero_grad")(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = _plain("state_dict")(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _plain("load_state_dict")(self, state_dict)
        numbers, parameters = (
            [entry for group in groups for entry in group["params"]]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for number, parameter in zip(numbers, parameters, strict=True):
            if _has_master(parameter) and number in state_dict["state"]:  # rounded to 16 bits by now
                for key, value in state_dict["state"][number].items():
                    if key != "step":
                        self.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)

    def grad_norm(self) -> float:
        """Return the 2-norm of all gradients together, before any scaling; NaN or infinite if a gradient is."""
        return self.global_norm().item()

    def global_norm(self) -> Tensor:
        """Return `grad_norm` as a float64 scalar on the gradients' device, without synchronising."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norms: list[Tensor] = [run(gradients) for run, _, gradients in self._alike("grad_norm", parameters)]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        norm = norms[0] if len(norms) == 1 else torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
        sharded = next((p.grad for p in parameters if hasattr(p.grad, "device_mesh")), None)
        return norm if sharded is None else _norm_of_shards(norm, sharded)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient, as if this were grad_scale times what it is.

        closure: computes the loss and the gradients anew; its loss is returned.
        grad_scale: a number, or a scalar on the gradients' device, which is not waited for.
        found_inf: a float32 scalar on the gradients' device. Unless it is 0, nothing is updated and no step counted, as
            in PyTorch's fused AdamW; the device decides, without synchronisation.

        Raises ValueError for a number grad_scale that is not finite, and RuntimeError for sparse gradients; nothing is
        updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if found_inf is not None and found_inf.device.type == "cpu":  # reading it costs nothing
            if found_inf.item() != 0:
                return loss
            found_inf = None
        if isinstance(grad_scale, Tensor) and grad_scale.device.type == "cpu":
            grad_scale = grad_scale.item()
        if not isinstance(grad_scale, Tensor) and not math.isfinite(grad_scale):
            raise ValueError(f"grad_scale is {grad_scale}, expected a finite number")
        alike = [(group, some) for group in self.param_groups for some in self._alike("adamw", group["params"])]
        updates = []
        for group, (run, parameters, gradients) in alike:
            states = [self.init_state(parameter) for parameter in parameters]
            exp_avgs, exp_avg_sqs, steps = (
                [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
            )
            masters = [state["master"] for state in states] if _has_master(parameters[0]) else []
            parameters, masters, exp_avgs, exp_avg_sqs = (
                [_local(tensor) for tensor in tensors] for tensors in (parameters, masters, exp_avgs, exp_avg_sqs)
            )
            tensors = parameters, masters, gradients, exp_avgs, exp_avg_sqs, steps
            updates.append((run, Update(*tensors, group, grad_scale, found_inf)))
        if len(updates) > 1:  # one checks all before it writes
            for group in self.param_groups:
                _check(group)
            for run, update in updates:
                run(update, check_only=True)
        for run, update in updates:
            run(update)
        return loss

    def _alike(self, op: str, params: list[Tensor]) -> list[tuple[Implementation, list[Tensor], list[Tensor]]]:
        """Return (implementation of `op`, parameters, gradients) for each device and dtype."""
        alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for parameter in params:
            if (gradient := parameter.grad) is not None:
                if gradient.is_sparse:
                    shape = tuple(parameter.shape)
                    raise RuntimeError(f"AdamW takes no sparse gradients, but that of a parameter {shape} is one")
                parameters, gradients = alike.setdefault((gradient.device, gradient.dtype), ([], []))
                parameters.append(parameter)
                gradients.append(_local(gradient))
        return [(self._select(op, *some), *some) for some in alike.values()]

    def _select(self, op: str, parameters: list[Tensor], gradients: list[Tensor]) -> Implementation:
        run = registry.select(op, self.backend, gradients[0])
        if run is not _adamw_cpu or all(_local(parameter).is_contiguous() for parameter in parameters):
            return run
        if (backend := self.backend or registry.in_use()) is None:
            return _adamw_torch
        shape, strides = next((tuple(p.shape), p.stride()) for p in parameters if not p.is_contiguous())
        raise RuntimeError(
            f"backend {backend!r} cannot run adamw: a parameter of shape {shape} has strides {strides}, expected a "
            "contiguous one; backend 'torch' takes it"
        )

    def init_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter, made if it has none yet: a checkpoint is read into it."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
        if state["step"].device != parameter.device:  # of PyTorch's AdamW without fused=True
            state["step"] = state["step"].to(parameter.device)
        if _has_master(parameter) and "master" not in state:  # new, or the state of another optimizer
            state |= {key: state[key].float() for key in ("exp_avg", "exp_avg_sq")}
            state["master"] = parameter.float()
        return state


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is sharded over processes (DTensor), or else the tensor."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _norm_of_shards(norm: Tensor, like: Any) -> Tensor:
    """Return the norm over all processes, each of which has that of its part."""
    squares = norm.square()
    torch.distributed.all_reduce(squares, group=like.device_mesh.get_group())
    return squares.sqrt()


def _plain(method: str) -> Callable[..., Any]:
    """Return a method of PyTorch's Optimizer, which would import torch._dynamo, to disable it: that takes seconds."""
    found: Callable[..., Any] = getattr(torch.optim.Optimizer, method)
    return found if "torch._dynamo" in sys.modules else inspect.unwrap(found)


def make_optimizer(model: nn.Module, args: TrainingArguments) -> AdamW:
    """Return AdamW (Loshchilov & Hutter 2019) over the parameters with requires_grad, a tied one once.

    Matrices decay, embeddings included; biases and the weights of norms do not, as in nanoGPT.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    assert len({id(parameter) for parameter in [*matrices, *vectors]}) == len(trained) == len(matrices) + len(vectors)
    if not trained:
        raise ValueError("the model has no parameter with requires_grad, so there is nothing to train")
    return AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
    )  # fmt: skip


def clip_factor(grad_norm: Tensor, max_grad_norm: float) -> Tensor | float:
    """Return the factor that limits gradients of this norm, as in torch.nn.utils.clip_grad_norm_; 0: no limit."""
    return (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0) if max_grad_norm > 0 else 1.0


def _has_master(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _check(group: Group) -> None:
    for key, low, high in (("lr", 0.0, math.inf), ("eps", 0.0, math.inf), ("weight_decay", 0.0, math.inf)):
        if not isinstance(group[key], (int, float)) or not low <= group[key] < high:
            raise ValueError(f"{key} is {group[key]!r}, expected a finite number, at least 0")
    betas = group["betas"]
    if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r}, expected two numbers, at least 0 and below 1")
    for key in ("amsgrad", "maximize", "capturable", "differentiable"):
        if group.get(key):
            raise ValueError(f"{key} is {group[key]!r}, which this AdamW does not have; torch.optim.AdamW has")


# ---- torch: PyTorch's own functions ----------------------------------------------------------------------------------


def _grad_norm_torch(gradients: list[Tensor]) -> Tensor:
    # In float64, where the squares of float32 numbers neither overflow nor vanish.
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float64)))


def _check_shapes(update: Update) -> None:
    for parameter, *moments in zip(update.parameters, update.exp_avgs, update.exp_avg_sqs, strict=True):
        if any(moment.shape != parameter.shape for moment in moments):
            shapes = [tuple(moment.shape) for moment in moments]
            raise ValueError(
                f"exp_avg and exp_avg_sq have shapes {shapes}, expected {tuple(parameter.shape)} as its parameter"
            )


def _adamw_torch(update: Update, check_only: bool = False) -> None:
    parameters, masters, gradients, exp_avgs, exp_avg_sqs, steps, group, grad_scale, found_inf = update
    _check_shapes(update)
    if check_only:
        return
    if masters:
        _follow_changes(masters, parameters)
        narrow, gradients = gradients, [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(gradients, narrow)
    if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
        scale = grad_scale.to(gradients[0].dtype) if isinstance(grad_scale, Tensor) else grad_scale
        gradients = list(torch._foreach_mul(gradients, scale))
    updated = masters or parameters
    beta1, beta2 = group["betas"]
    numbers: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay", "eps")}
    numbers |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
    # The fused function is three times as fast on a GPU, but needs dense memory; only it can skip on the device
    if updated[0].device.type in ("cpu", "cuda") and all(
        t.is_contiguous() for t in (*updated, *gradients, *exp_avgs, *exp_avg_sqs)
    ):
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            updated, gradients, exp_avgs, exp_avg_sqs, [], steps, **numbers, grad_scale=None, found_inf=found_inf
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        torch.autograd.graph.increment_version(updated)
    elif found_inf is None or found_inf.item() == 0:
        adamw(updated, gradients, exp_avgs, exp_avg_sqs, [], steps, foreach=True, **numbers)
    if masters:
        torch._foreach_copy_(parameters, masters)


def _follow_changes(masters: list[Tensor], parameters: list[Tensor]) -> None:
    """Overwrite elements of the masters whose rounding is not that of the parameter: it has been changed since.

    Many tensors are joined, because on a GPU the launches of four kernels for each take longer than the copies.
    """
    for bucket in buckets(range(len(masters)), parameters):
        mine, theirs = [masters[i] for i in bucket], [parameters[i] for i in bucket]
        wide, narrow = (t[0].flatten() if len(t) == 1 else torch.cat([x.flatten() for x in t]) for t in (mine, theirs))
        kept = torch.where(wide.to(narrow.dtype) == narrow, wide, narrow.float())
        parts = kept.split([master.numel() for master in mine])
        torch._foreach_copy_(mine, [part.view_as(master) for part, master in zip(parts, mine, strict=True)])


# ---- cpu: kernels/cpu/adamw.cpp --------------------------------------------------------------------------------------


def _grad_norm_cpu(gradients: list[Tensor]) -> Tensor:
    norm = _C.grad_norm([gradient.contiguous() for gradient in gradients], torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def _adamw_cpu(update: Update, check_only: bool = False) -> None:
    parameters, masters, group = update.parameters, update.masters, update.group
    beta1, beta2 = group["betas"]
    gradients = [gradient.contiguous() for gradient in update.gradients]
    updated, copies = (masters, parameters) if masters else (parameters, [])
    _C.adamw(
        updated, copies, gradients, update.exp_avgs, update.exp_avg_sqs, update.steps, group["lr"], beta1, beta2,
        group["eps"], group["weight_decay"], float(update.grad_scale), torch.get_num_threads(),
        check_only,
    )  # fmt: skip
    if not check_only:
        torch.autograd.graph.increment_version(parameters)  # so that a backward pass that needs the old ones says so


# ---- cuda, triton: kernels/triton/adamw.py ---------------------------------------------------------------------------

_tables = WeakIdKeyDictionary()  # by the first parameter: the addresses, and the table of them on the device


def _adamw_triton(update: Update, check_only: bool = False) -> None:
    """Update all tensors in one launch; the kernel has their addresses in a table, made anew when one changes."""
    parameters, masters, gradients, exp_avgs, exp_avg_sqs, steps, group, grad_scale, found_inf = update
    wide = *masters, *exp_avgs, *exp_avg_sqs, *steps
    dense = all(tensor.is_contiguous() for tensor in (*parameters, *gradients, *wide))
    if not dense or any(tensor.dtype != torch.float32 for tensor in wide):
        _adamw_torch(update, check_only)
        return
    _check_shapes(update)
    if check_only:
        return
    kernels, like = native.triton_module("adamw"), parameters[0]
    addresses, pieces = kernels.table(parameters, masters, gradients, exp_avgs, exp_avg_sqs, steps)
    known, *tables = _tables.get(like, (None,))
    if known != addresses:
        tables = [torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in (addresses, pieces())]
        if like.is_cuda:  # from pinned memory the copy does not wait for the device
            tables = [rows.pin_memory().to(like.device, non_blocking=True) for rows in tables]
        _tables[like] = addresses, *tables
    torch._foreach_add_(steps, 1 if found_inf is None else [1.0 - found_inf] * len(steps))
    kernels.step(
        *tables, like, bool(masters), grad_scale.float() if isinstance(grad_scale, Tensor) else grad_scale, found_inf,
        **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
    )  # fmt: skip
    torch.autograd.graph.increment_version(parameters)


def _adamw_cuda(update: Update, check_only: bool = False) -> None:
    """The kernel of Triton, or PyTorch's functions where it is not usable."""
    (_adamw_torch if registry.BACKENDS["triton"].problem() else _adamw_triton)(update, check_only)


def _two_steps(parameter: Tensor, gradient: Tensor, backend: str | None = None) -> Tensor:
    """Return the parameter after two steps; as the check on first use expects, it can be differentiated."""
    updated = parameter.detach().clone()
    optimizer = AdamW([updated], lr=10.0, backend=backend)  # so that the update is not lost in the rounding
    for factor in (1.0, -0.5):
        updated.grad = gradient.detach() * factor
        optimizer.step()
    both = parameter + gradient
    return updated + (both - both.detach())


_SHAPES = {"parameter": (70, 1000), "gradient": (70, 1000)}  # more than a program of the kernel updates
registry.register(
    Operation("grad_norm", {**dict.fromkeys(registry.WITH_TORCH, _grad_norm_torch), "cpu": _grad_norm_cpu}, [])
)
registry.register(
    Operation(
        "adamw",
        {
            **dict.fromkeys(("torch", "simt"), _adamw_torch),
            "cpu": _adamw_cpu, "cuda": _adamw_cuda, "triton": _adamw_triton,
        },
        [],
        first_use=lambda _: Sample("first use", _two_steps, _SHAPES),
    )
)  # fmt: skip
