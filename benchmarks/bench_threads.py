"""Threads: scaling, a single thread, a forked worker, and two processes that compete for the cores."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import measure
from benchmarks.bench_kernels import forward_backward
from benchmarks.bench_small_model import FUSED, SMALL, SMALL_BATCH, small_pair
from benchmarks.measure import PYTORCH, Run, pick, reference
from gptcore import ops

Compare = Callable[..., None]
SHAPE = (1, pick(2, 12), pick(16, 1024), 64)
CASE = f"attention forward + backward, D=64 S={SHAPE[2]}"
NEIGHBOUR = """
import torch
from gptcore import ops
torch.set_num_threads({threads})
q, k, v = (torch.randn({shape}).requires_grad_() for _ in range(3))
print("running", flush=True)
while True:
    torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
"""


def with_threads(threads: int, run: Run) -> Run:
    def limited() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run()
        finally:
            torch.set_num_threads(before)

    return limited


def attention_pair() -> tuple[Run, Run]:
    """Return attention forward and backward, ours and PyTorch's."""
    sdpa: Callable[..., Tensor] = reference(F.scaled_dot_product_attention)
    inputs = [torch.randn(SHAPE).requires_grad_() for _ in "qkv"]
    grads = [torch.randn(SHAPE)]
    theirs = forward_backward(lambda q, k, v: sdpa(q, k, v, is_causal=True), inputs, grads)
    return forward_backward(ops.attention, inputs, grads), theirs


def bench_one_thread(compare: Compare) -> None:
    ours, theirs = attention_pair()
    compare("one thread", CASE, with_threads(1, ours), with_threads(1, theirs), against=PYTORCH)


def bench_scaling(compare: Compare) -> None:
    """Time all threads against one; the ratio is at most the number of threads."""
    ours, _ = attention_pair()
    case = f"{torch.get_num_threads()} against 1, {CASE}"
    compare("scaling with threads", case, ours, with_threads(1, ours), against="one thread")


def bench_forked_worker(compare: Compare) -> None:
    """Time a forked DataLoader worker with one thread, which runs either side on request of the main process."""
    ours, theirs = attention_pair()
    ours(), theirs()  # starts the parent's threads before the fork
    parent, child = multiprocessing.get_context("fork").Pipe()

    class Worker(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            while (name := child.recv()) != "stop":
                {"ours": ours, "theirs": theirs}[name]()
                child.send(torch.get_num_threads())
            return index

    def ask(name: str) -> None:
        parent.send(name)
        assert parent.poll(60), "the worker does not answer"
        assert parent.recv() == 1

    items = iter(DataLoader(Worker(), sampler=[0], batch_size=None, num_workers=1, multiprocessing_context="fork"))
    compare("in a forked DataLoader worker", CASE, lambda: ask("ours"), lambda: ask("theirs"), against=PYTORCH)
    parent.send("stop")
    assert list(items) == [0]


@pytest.mark.skipif(measure.FORM == "toy", reason="a toy must not load the machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=measure.name_of)
def bench_training_under_load(dtype: torch.dtype, compare: Compare) -> None:
    """Time steps of the small model while one other process for each core computes without pause."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(torch.get_num_threads())]
    try:
        compare(
            f"training step with a busy process on each core {measure.name_of(dtype)}", "the small model",
            *small_pair(SMALL, SMALL_BATCH, dtype, dtype, dtype, fused=True), against=FUSED,
        )  # fmt: skip
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.skipif(measure.FORM == "toy", reason="a toy must not load the machine")
def bench_two_processes(compare: Compare) -> None:
    """Time both sides while another process with as many threads computes attention continuously."""
    script = NEIGHBOUR.format(threads=torch.get_num_threads(), shape=SHAPE)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as neighbour:
        try:
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == "running\n", "the neighbour did not start"
            compare("with another busy process", CASE, *attention_pair(), against=PYTORCH)
        finally:
            neighbour.kill()
