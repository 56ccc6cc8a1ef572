"""The choice of a backend with threads, tasks and torch.compile, and when CUDA is asked."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_native import python

from gptcore import ops
from gptcore.ops import registry


@pytest.fixture(autouse=True)
def _no_default() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)
    ops.set_default_backend(None)


def in_another_thread(call: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_block_holds_for_its_thread_alone() -> None:
    """Also between the call of `use` and the first line of the block, which a switch of threads may separate."""
    sys.setswitchinterval(1e-6)
    seen: set[str | None] = set()
    begun, done = threading.Event(), threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(ops.in_use())
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(look)
        begun.wait()
        for _ in range(300):
            with ops.use("torch"):
                assert ops.in_use() == "torch"
        done.set()
        other.result()
    assert seen == {None}


def test_the_default_of_the_process_holds_for_all_threads() -> None:
    with ThreadPoolExecutor(1) as pool:  # a thread that is there before
        assert pool.submit(ops.in_use).result() is None
        ops.set_default_backend("torch")
        assert pool.submit(ops.in_use).result() == in_another_thread(ops.in_use) == ops.in_use() == "torch"
        with ops.use("cpu"):
            assert in_another_thread(ops.in_use) == "torch"
            pool.submit(ops.set_default_backend, None).result()
            assert ops.in_use() == "cpu"
            assert in_another_thread(ops.in_use) is None
        assert ops.in_use() is None


def test_a_call_of_use_holds_for_its_thread_from_then_on() -> None:
    """Whether its result is kept or not."""
    with ThreadPoolExecutor(1) as pool:
        for keep in (True, False):
            kept = pool.submit(ops.use, "torch").result()
            if not keep:
                del kept
                gc.collect()
            assert pool.submit(ops.in_use).result() == "torch"
            assert ops.in_use() is None
            pool.submit(ops.use, "cpu").result()
            with ops.use(None):
                assert pool.submit(ops.in_use).result() == "cpu"


def test_a_block_in_a_task_is_not_seen_by_other_tasks() -> None:
    async def block(backend: str) -> None:
        with ops.use(backend):
            for _ in range(10):
                await asyncio.sleep(0)
                assert ops.in_use() == backend

    async def both() -> None:
        await asyncio.gather(block("cpu"), block("torch"))

    asyncio.run(both())
    assert ops.in_use() is None


def test_a_compiled_function_follows_use() -> None:
    torch._dynamo.reset()
    x = torch.randn(1000)
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="eager")
    by_backend = {backend: ops.gelu(x, backend=backend) for backend in ("cpu", "torch")}
    assert not torch.equal(*by_backend.values())
    for backend in ("cpu", "torch", "cpu"):
        with ops.use(backend):
            assert torch.equal(compiled(x), by_backend[backend])
        ops.set_default_backend(backend)
        assert torch.equal(compiled(x), by_backend[backend])
        ops.set_default_backend(None)
        assert torch.equal(compiled(x), by_backend["cpu"])


def test_an_unknown_backend_changes_nothing() -> None:
    ops.set_default_backend("torch")
    for choose in (ops.use, ops.set_default_backend):
        with pytest.raises(ValueError, match="unknown backend 'gpu'"):
            choose("gpu")
        assert ops.in_use() == "torch"


def test_every_operation_has_a_formula_and_samples() -> None:
    for name in ("attention", "layer_norm", "gelu", "linear", "linear_cross_entropy", "quantized_linear"):
        operation = registry.OPERATIONS[name]
        assert "torch" in operation.implementations
        assert operation.samples
        for backend, implementation in operation.implementations.items():
            found = registry.BACKENDS[backend].implementations[name]
            assert getattr(found, "__wrapped__", found) is implementation


@pytest.mark.slow
def test_importing_and_running_on_the_cpu_do_not_ask_cuda() -> None:
    """A forked child, and CUDA_VISIBLE_DEVICES set after the import, would otherwise come too late."""
    done = python("""
import importlib.machinery, importlib.util, os, pathlib, sys
import torch
from torch.utils.data import DataLoader

def asked(*_): raise AssertionError("CUDA was asked")
real = {}
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
    real[name] = getattr(torch.cuda, name)
    setattr(torch.cuda, name, asked)
folder = pathlib.Path(importlib.util.find_spec("gptcore").origin).parent
(path,) = folder.glob("_C.*.so")
loader = importlib.machinery.ExtensionFileLoader("gptcore._C", str(path))
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("gptcore._C", loader))
loader.exec_module(native)
problem, native.cuda_problem = native.cuda_problem, lambda: asked() if not real_answers else problem()
real_answers = False
sys.modules["gptcore._C"] = native

import gptcore
from gptcore import ops
from gptcore.training.optim import AdamW
assert gptcore.ops.registry._C is native
model = gptcore.GPT(gptcore.GPTConfig(vocab_size=9, n_positions=8, n_layer=1, n_head=1, n_embd=8))
model(torch.zeros(1, 8, dtype=torch.int64), labels=torch.zeros(1, 8, dtype=torch.int64)).loss.backward()
optimizer = AdamW(model.parameters())
optimizer.grad_norm()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules, "importing it takes seconds, and only torch.compile needs it"
with ops.use("cpu"):
    ops.chosen("attention", next(model.parameters()))
assert not torch.cuda.is_initialized()

child = os.fork()
if child == 0:  # asks for the first time here
    real_answers = True
    for name, function in real.items():
        setattr(torch.cuda, name, function)
    assert set(ops.backends()) == {"cuda", "cpu", "triton", "torch", "simt"}
    ops.gelu(torch.zeros(4), backend="cpu")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done")
""")
    assert done.stdout == "done\n", done.stderr
