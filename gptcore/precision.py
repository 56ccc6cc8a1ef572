"""Measures how 16-bit floating point compares with float32 on this CPU, and warns where it is slower.

CPUs without instructions for bfloat16 or float16 convert each number, so 16 bits can take a hundred times as long.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from gptcore import _C, ops

WIDTH, HEADS = 256, 4  # the transformer block that is measured
SLOWER = 1.5  # the lowest ratio that warns: below it, a larger model may still be faster in 16 bits


_warned: set[torch.dtype] = set()


def warn_if_slow(dtype: torch.dtype, device: torch.device | str, advice: str) -> None:
    """Warn once for each 16-bit dtype that is slower than float32 on this device, with the measured ratio."""
    if torch.device(device).type == "cpu" and dtype not in _warned and (ratio := slowdown(dtype)) >= SLOWER:
        _warned.add(dtype)
        warnings.warn(f"{name(dtype)} takes {ratio:.2g} times as long as float32 on this CPU; {advice}", stacklevel=3)


def slowdown(dtype: torch.dtype) -> float:
    """Return the time of a transformer block in `dtype` by its time in float32, on the CPU; measured once.

    Returns 1.0 for other dtypes than bfloat16 and float16, and if a simulator or an interpreter runs the operations.
    """
    if dtype not in (torch.bfloat16, torch.float16) or ops.in_use() not in (None, "cpu", "torch"):
        return 1.0
    return _measured(dtype, torch.get_num_threads(), _C.cpu_isa(), ops.in_use())


def fastest(runs: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the shortest time of each function over interleaved rounds. Noise only adds time.

    Starts no round after `seconds`; the first round, which allocates memory, only counts if it is the last.
    """
    times: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    while not times[0] or time.perf_counter() - started < seconds:
        for run, taken in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begun)
    return [min(taken[1:] or taken) for taken in times]


def name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _measured(dtype: torch.dtype, threads: int, isa: str, backend: str | None) -> float:
    ratio = 1.0
    for tokens in (32, 256):
        runs = [functools.partial(_run_block, kind, tokens) for kind in (torch.float32, dtype)]
        float32, other = fastest(runs, seconds=0.1)
        ratio = other / float32
        if ratio > 4:  # far above SLOWER already, and more tokens could take seconds
            break
    return ratio


def _run_block(dtype: torch.dtype, tokens: int) -> None:
    """Compute a transformer block on zeros, forward and backward. Draws no random numbers."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu", requires_grad=True)

    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x, norm = zeros(1, tokens, WIDTH), zeros(WIDTH)
        q, k, v = (
            ops.linear(ops.layer_norm(x, norm, norm), zeros(3 * WIDTH, WIDTH)).view(1, tokens, 3, HEADS, -1).unbind(2)
        )
        mixed = ops.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        update = ops.linear(mixed.transpose(1, 2).reshape(1, tokens, WIDTH), zeros(WIDTH, WIDTH))
        out, x = ops.layer_norm(update, norm, norm, residual=x)
        hidden = ops.gelu(ops.linear(out, zeros(4 * WIDTH, WIDTH)), approximate="tanh")
        torch.autograd.backward((x + ops.linear(hidden, zeros(WIDTH, 4 * WIDTH))).sum())
