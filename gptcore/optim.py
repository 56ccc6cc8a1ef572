"""AdamW that updates all parameters in one pass over memory, with gradient clipping folded in.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101), algorithm 2. State and state
dict are those of torch.optim.AdamW: each loads the other's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gptcore import _C
from gptcore.ops import registry

Group = dict[str, Any]
Implementation = Callable[..., Any]


class AdamW(torch.optim.Optimizer):
    """For each parameter, with g = grad_scale x gradient, after t steps:

        exp_avg     <-  beta1 exp_avg + (1 - beta1) g
        exp_avg_sq  <-  beta2 exp_avg_sq + (1 - beta2) g^2
        parameter   <-  (1 - lr weight_decay) parameter
                        - lr / (1 - beta1^t) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

    A step with the gradient's norm clipped to max_norm reads the gradients twice and writes them never:

        norm = optimizer.grad_norm()
        optimizer.step(grad_scale=min(1.0, max_norm / (norm + 1e-6)))

    Settings are torch.optim.AdamW's; it has no amsgrad, maximize, capturable or differentiable. Backends are those of
    gptcore.ops: `cpu` for parameters in float32, which must be contiguous; `torch` for all.

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
        super().add_param_group(param_group)
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

    def grad_norm(self) -> float:
        """The 2-norm of all gradients together, before any scaling; NaN or infinite if one of them holds such."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        alike = self._alike("grad_norm", parameters)
        return math.hypot(*(run(gradients) for run, _, gradients in alike))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: float = 1.0) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, as if this were grad_scale times what it is.

        closure: computes the loss and the gradients anew; its loss is returned. Raises ValueError for a grad_scale that
        is not finite, and RuntimeError for sparse gradients; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not math.isfinite(grad_scale):
            raise ValueError(f"grad_scale is {grad_scale}, expected a finite number")
        updates = [(group, alike) for group in self.param_groups for alike in self._alike("adamw", group["params"])]
        for group, (run, parameters, gradients) in updates:
            states = [self.state[parameter] or self._new_state(parameter) for parameter in parameters]
            moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")]
            run(parameters, gradients, *moments, group, grad_scale)
        return loss

    def _alike(self, op: str, params: list[Tensor]) -> list[tuple[Implementation, list[Tensor], list[Tensor]]]:
        """What runs `op`, for which parameters with which gradients: together those of one device and dtype."""
        alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for parameter in params:
            if (gradient := parameter.grad) is not None:
                if gradient.is_sparse:
                    shape = tuple(parameter.shape)
                    raise RuntimeError(f"AdamW takes no sparse gradients, but that of a parameter {shape} is one")
                parameters, gradients = alike.setdefault((gradient.device, gradient.dtype), ([], []))
                parameters.append(parameter)
                gradients.append(gradient)
        return [(registry.select(op, self.backend, some[1][0]), *some) for some in alike.values()]

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


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


def _grad_norm_torch(gradients: list[Tensor]) -> float:
    return float(nn.utils.get_total_norm(gradients))


def _adamw_torch(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Group,
    grad_scale: float,
) -> None:
    if grad_scale != 1.0:
        gradients = list(torch._foreach_mul(gradients, grad_scale))
    beta1, beta2 = group["betas"]
    adamw(
        parameters, gradients, exp_avgs, exp_avg_sqs, [], steps, foreach=True, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


# ---- cpu: kernels/cpu/adamw.cpp --------------------------------------------------------------------------------------


def _grad_norm_cpu(gradients: list[Tensor]) -> float:
    return _C.grad_norm([gradient.contiguous() for gradient in gradients], torch.get_num_threads())


def _adamw_cpu(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Group,
    grad_scale: float,
) -> None:
    gradients = [gradient.contiguous() for gradient in gradients]
    beta1, beta2 = group["betas"]
    _C.adamw(
        parameters, gradients, exp_avgs, exp_avg_sqs, steps, group["lr"], beta1, beta2, group["eps"],
        group["weight_decay"], grad_scale, torch.get_num_threads(),
    )  # fmt: skip
    torch.autograd.graph.increment_version(parameters)  # so that a backward pass that needs the old ones says so


registry.BACKENDS["cpu"].implementations |= {"grad_norm": _grad_norm_cpu, "adamw": _adamw_cpu}
for name in registry.WITH_TORCH:
    registry.BACKENDS[name].implementations |= {"grad_norm": _grad_norm_torch, "adamw": _adamw_torch}
registry.BACKENDS["cpu"].narrower |= dict.fromkeys(("grad_norm", "adamw"), (torch.float32,))
