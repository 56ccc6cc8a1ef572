"""What arguments of the trainer cost or save: gradient_reduction, gradient_checkpointing and torch_compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.bench_small_model import SMALL, SMALL_BATCH
from benchmarks.measure import FORM, PROCESSES, pick, seconds
from benchmarks.models import NO_DROPOUT, Trainee, difference
from gptcore import GPT, GPTConfig
from gptcore.training import distributed
from gptcore.training.gradients import GradientSum
from gptcore.training.optim import AdamW
from gptcore.training.recompute import recomputed_blocks

Compare = Callable[..., None]
MEDIUM = GPTConfig(
    vocab_size=pick(65, 8192), n_positions=256, n_embd=pick(32, 512), n_layer=pick(1, 6), n_head=8, **NO_DROPOUT
)
MEDIUM_BATCH = pick((2, 8), (8, 256))
MEDIUM_CASE = "{} layers, width {}, batch {} x {}".format(MEDIUM.n_layer, MEDIUM.n_embd, *MEDIUM_BATCH)
ROUNDS = {"toy": 2, "quick": 5, "full": 30}[FORM]


def bench_reduction(record: Callable[..., None], tmp_path: Path) -> None:
    """Time the sum of the gradients of four micro-batches in two processes, over gloo on this machine."""
    other = PROCESSES.Process(target=sum_gradients, args=(1, tmp_path / "group"))
    other.start()
    tree, plain = sum_gradients(0, tmp_path / "group")
    other.join(60)
    assert other.exitcode == 0
    case = f"{MEDIUM.num_parameters / 1e6:,.1f} M parameters, 2 micro-batches each"
    record("sum of gradients over 2 processes", case, tree, plain, against="all-reduce")


def sum_gradients(rank: int, group: Path) -> list[list[float]]:
    """Return the seconds of each round in the tree, and of each with a plain all-reduce."""
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    parameters = list(GPT(MEDIUM).parameters())
    processes, loss = distributed.join(torch.device("cpu")), torch.zeros(())
    times: list[list[float]] = [[], []]
    for _ in range(1 + ROUNDS):
        for exact in (True, False):
            gradients = GradientSum(parameters, processes, 4, exact)
            made = [[torch.ones_like(parameter) for parameter in parameters] for _ in range(2)]
            gradients.clear()

            def run(made: list[list[torch.Tensor]] = made, gradients: GradientSum = gradients) -> None:
                for leaf in made:
                    for parameter, gradient in zip(parameters, leaf, strict=True):
                        parameter.grad = gradient
                    gradients.add(loss)
                gradients.finish(0, loss.device)

            times[not exact].append(seconds(run))
    distributed.leave()
    return [column[1:] for column in times]


def bench_recomputation(compare: Compare) -> None:
    """Time a step with gradient_checkpointing=True; bench_memory.py has the memory that it saves."""
    torch.manual_seed(0)
    model = GPT(MEDIUM)
    with_it, without = (
        Trainee(each, AdamW(each.parameters(), lr=1e-4), MEDIUM_BATCH, torch.float32)
        for each in (copy.deepcopy(model), model)
    )

    def recomputing() -> None:
        with recomputed_blocks(with_it.model):
            with_it()

    extra: dict[str, Any] = {}
    compare("training step with recomputation", MEDIUM_CASE, recomputing, without, against="without it", extra=extra)
    extra["loss difference"] = difference(with_it, without)


@pytest.mark.skipif(FORM == "toy", reason="compiles for half a minute")
def bench_compile(compare: Compare) -> None:
    """Time a step with torch_compile=True; the compilation, in the first step, is not timed."""
    torch.manual_seed(0)
    models: list[Any] = [model := GPT(SMALL), torch.compile(copy.deepcopy(model))]
    eager, compiled = (Trainee(each, AdamW(each.parameters(), lr=1e-4), SMALL_BATCH, torch.float32) for each in models)
    extra: dict[str, Any] = {}
    case = "{} layers, width {}, batch {} x {}".format(SMALL.n_layer, SMALL.n_embd, *SMALL_BATCH)
    compare("training step with torch.compile", case, compiled, eager, against="without it", extra=extra)
    extra["loss difference"] = difference(compiled, eager)
