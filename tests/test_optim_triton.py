"""AdamW's kernel for GPUs in Triton's interpreter, against PyTorch's functions.

Without the checks of tests/interpreter.py: the kernel is given a table of addresses, not the tensors.
"""

from __future__ import annotations

import pytest
import torch
from grid import BF16, F16, F32, F64, ON_GPU
from test_optim import give_gradients, groups, parameters
from torch import nn

from gptcore import ops
from gptcore.ops import native, registry, verify
from gptcore.training.optim import AdamW, Update

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        ops.backends()["triton"] is not None or ON_GPU != [],
        reason=f"triton: {ops.backends()['triton'] or 'compiled, not interpreted'}",
    ),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_kernel_of_gpus_equals_pytorchs_functions(dtype: torch.dtype) -> None:
    """A step is skipped, a tensor moves, and other code changes weights."""
    results = []
    for backend in ("torch", "triton"):
        params = [nn.Parameter(p.detach()) for p in parameters(dtype)]
        optimizer = AdamW(groups(params), lr=1e-2, backend=backend)
        for step in range(6):
            give_gradients(params, step, rounded_to=dtype)
            if step == 3:
                params[-1].data = params[-1].detach().clone()
                params[-1].data[:2] = 7.0
            for group in optimizer.param_groups:
                states = [optimizer.init_state(p) for p in group["params"]]
                masters = [state["master"] for state in states if "master" in state]
                lists = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")]
                gradients = [p.grad for p in group["params"]]
                found_inf = torch.tensor(float(step == 4))
                scale = torch.tensor(0.5, dtype=F64) if step % 2 else 0.25
                update = Update(list(group["params"]), masters, gradients, *lists, group, scale, found_inf)
                before = [p.detach().clone() for p in params]
                with torch.no_grad():
                    registry.BACKENDS[backend].implementations["adamw"](update)
                assert step != 4 or all(map(torch.equal, before, params))
        states = [optimizer.state[p] for p in params]
        assert {float(state["step"]) for state in states} == {5.0}
        results.append([*params, *(tensor for state in states for tensor in state.values())])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(ours.dtype).eps, atol=1e-7)


def test_the_check_on_first_use_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    make, like = registry.OPERATIONS["adamw"].first_use, torch.zeros(1, dtype=BF16)
    assert make is not None
    assert verify._compare("triton", make(0), like) is None
    kernels = native.triton_module("adamw")
    step = kernels.step
    monkeypatch.setattr(kernels, "step", lambda *args, **numbers: step(*args, **{**numbers, "betas": (0.8, 0.999)}))
    assert "relative error" in str(verify._compare("triton", make(0), like))
