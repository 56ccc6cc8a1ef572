"""cuda_graph: what is copied into a graph's memory and out of it, in which order, and what is refused. Without a GPU.

The fake graph repeats the recorded pass on the recorded tensors, as a CUDA graph does: a number that is not copied into
them is one of an earlier step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import same, tiny_model, tiny_trainer, weights
from torch._subclasses.fake_tensor import FakeTensorMode

from gptcore import ops
from gptcore.training import graph
from gptcore.training.arguments import TrainingArguments
from gptcore.training.mixed_precision import MixedPrecision

DATA = [torch.arange(i, i + 8) % 32 for i in range(10)]  # with batches of 4, the last of an epoch has 2


class FakeGraph:
    """Repeats run(inputs, weight) in the memory of the pass that was recorded."""

    events: list[str]
    pass_: graph.GraphedPass

    def replay(self) -> None:
        recorded = next(entry for entry in self.pass_.recorded.values() if entry[0] is self)
        _, inputs, loss, gradients = recorded
        for parameter in self.pass_.parameters:
            parameter.grad = None
        loss.copy_(self.pass_.run(inputs, self.pass_.weight).detach())
        for parameter, gradient in zip(self.pass_.parameters, gradients, strict=True):
            if gradient is not None:
                gradient.copy_(parameter.grad)
        self.events.append("replay")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    class Stream:
        def __init__(self, *_: Any) -> None: ...

        def wait_stream(self, _: Any) -> None:
            found.append("wait")

    @contextlib.contextmanager
    def named(name: str) -> Iterator[None]:
        found.append(name)
        with contextlib.nullcontext() if name == "eager" else torch.random.fork_rng(devices=[]):  # recording draws none
            yield

    init = graph.GraphedPass.__init__

    def noting(self: Any, *args: Any) -> None:
        init(self, *args)
        FakeGraph.pass_ = self

    FakeGraph.events = found
    monkeypatch.setattr(graph.GraphedPass, "__init__", noting)
    monkeypatch.setattr(graph, "check", lambda *_: None)
    for name, value in {
        "Stream": Stream, "current_stream": Stream, "graph_pool_handle": lambda: (0, 1), "CUDAGraph": FakeGraph,
        "stream": lambda _: named("eager"), "graph": lambda *_, **__: named("record"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return found


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"fp16": True}], ids=str)
def test_a_run_in_graphs_has_the_same_bits(tmp_path: Path, events: list[str], changes: dict[str, Any]) -> None:
    results = []
    for cuda_graph in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(cuda_graph), data=DATA, max_steps=16, cuda_graph=cuda_graph, logging_steps=3, **changes
        )
        out = trainer.train()
        results.append((out.training_loss, weights(trainer.model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert events[:3] == ["wait", "eager", "wait"]
    assert events.count("eager") == 2 * graph.WARM_UP
    assert events.count("record") == 2
    passes = 16 if "gradient_accumulation_steps" not in changes else 24
    assert events.count("replay") == passes - 2 * graph.WARM_UP


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"fp16": True}], ids=str)
def test_a_run_in_graphs_of_a_gpu_has_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    results = []
    for cuda_graph in (False, True):
        model = tiny_model(attn_pdrop=0.0).cuda()
        options: dict[str, Any] = {"model": model, "data": DATA, "max_steps": 16, "cuda_graph": cuda_graph, **changes}
        out = tiny_trainer(tmp_path / str(cuda_graph), **options).train()
        results.append((out.training_loss, weights(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_graph_holds_no_cast_of_an_earlier_step(cuda_graph: bool) -> None:
    mixed = MixedPrecision(TrainingArguments("out", bf16=True, cuda_graph=cuda_graph), torch.device("cpu"))
    weight, casts = torch.ones(2, 2, requires_grad=True), []
    with mixed.kept_casts():
        for _ in range(2):
            with mixed.autocast():
                loss = (torch.ones(1, 2) @ weight).float().sum()
            torch.autograd.backward(loss)
            with torch.no_grad():
                weight += 1  # as between two steps
            casts.append(float(loss.detach()))
    assert casts == ([4.0, 8.0] if cuda_graph else [4.0, 4.0])


def test_more_shapes_than_graphs(tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "SHAPES", 2)
    data = [torch.arange(2 + i // 4) for i in range(16)]
    trainer = tiny_trainer(tmp_path, data=data, cuda_graph=True, per_device_train_batch_size=1, max_steps=16)
    with pytest.raises(ValueError, match=r"expected at most 2, but .*input_ids.* is one more; pad or cut"):
        trainer.train()


def test_what_no_graph_can_repeat_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph=True needs an NVIDIA GPU, but the model is on cpu"):
        trainer.train()
    with pytest.raises(ValueError, match=r"every step, but h\.0\.attn\.attn_pdrop is 0\.1, expected 0"):
        graph.check(torch.device("cuda"), trainer.own_model)
    graph.check(torch.device("cuda"), tiny_model(dropout=0.0))
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        q = torch.empty(1, 1, 4, 8, device="cuda")
        with pytest.raises(RuntimeError, match=r"dropout_p is 0\.1, but a CUDA graph would drop the same weights"):
            ops.attention(q, q, q, dropout_p=0.1)
    for name, value in (
        ("parallel", "fsdp"), ("torch_compile", True), ("gradient_checkpointing", True), ("packing", True)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"cuda_graph and {name}.* are both given"):
            TrainingArguments("out", cuda_graph=True, **{name: value})  # type: ignore[arg-type]
