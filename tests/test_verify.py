"""A kernel's check on its first use: with the CPU's kernels in the place of a GPU's, right ones and wrong ones."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore import ops
from gptcore.ops import registry, verify

TENSORS = {"attention": torch.zeros(1, 1, 1, 64), "layer_norm": torch.zeros(1, 8), "gelu": torch.zeros(1, 8)}


@pytest.fixture(autouse=True)
def _forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(verify, "_results", {})


def failure(op: str, dtype: torch.dtype, run: Callable[..., Any] | None = None) -> str | None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if run is not None:
            monkeypatch.setitem(registry.BACKENDS["cpu"].implementations, op, run)
        return verify.failure("cpu", registry.OPERATIONS[op], TENSORS[op].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", TENSORS)
def test_right_kernels_pass_and_are_remembered(op: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert failure(op, dtype) is None
    (key,) = json.loads((tmp_path / "verified.json").read_text())
    assert f"cpu {op} {dtype}" in key
    verify._results.clear()
    assert failure(op, dtype, run=lambda *_: pytest.fail("called again")) is None


@pytest.mark.parametrize("content", ["{", "3", "[" * 100_000, "\0", "[[]]", None])
def test_a_broken_file_is_no_reason_to_fail(tmp_path: Path, content: str | None) -> None:
    if content is None:
        os.mkfifo(tmp_path / "verified.json")
    else:
        (tmp_path / "verified.json").write_text(content)
    assert failure("gelu", torch.float32) is None


WRONG: dict[str, Callable[[Callable[..., Any], tuple[Any, ...]], Any]] = {
    "scaled": lambda run, args: tuple(t * 1.01 for t in run(*args)),
    "one element": lambda run, args: tuple(t.index_fill(-1, torch.tensor([3]), 0.5) for t in run(*args)),
    "nan": lambda run, args: tuple(t * math.nan for t in run(*args)),
    "refuses": lambda run, args: (_ for _ in ()).throw(RuntimeError("an illegal instruction")),
    "gradient": lambda run, args: tuple(_Doubled.apply(t) for t in run(*args)),
}


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_named_and_left_alone(wrong: str, tmp_path: Path) -> None:
    run = registry.BACKENDS["cpu"].implementations["attention"]

    def broken(*args: Any) -> Any:
        return WRONG[wrong](run, args)

    with pytest.warns(UserWarning, match=r"the kernel cpu attention torch.float32 head_dim 64 is wrong on cpu"):
        reason = failure("attention", torch.float32, broken)
    assert reason is not None
    assert "illegal" in reason or "relative error" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert failure("attention", torch.float32, broken) == reason
    assert not (tmp_path / "verified.json").exists()


def test_the_next_backend_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that failed its check is skipped; tested without a GPU."""
    monkeypatch.setattr(registry, "VERIFIED", ["cpu"])
    monkeypatch.setattr(verify, "failure", lambda *_: "it is wrong here")
    x = torch.zeros(2, 4)
    assert registry.chosen("gelu", x)[0] != "cpu"
    assert "not cpu: it is wrong here" in registry.chosen("gelu", x)[1]
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run gelu: it is wrong here"):
        registry.select("gelu", "cpu", x)


def test_torch_compile_sees_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "VERIFIED", ["cpu"])
    compiled = torch.compile(ops.gelu, backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    assert torch.equal(compiled(x), ops.gelu(x))  # not checked before, while recording; then checked
    assert torch.equal(compiled(x), ops.gelu(x))
    assert [kernel[:2] for kernel in verify._results] == [("cpu", "gelu")]


def test_a_gpu_is_told_from_others_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(verify, "_driver", lambda: 13000)
    assert verify._gpu(torch.device("cuda", 0)).startswith("a GPU, sm_90, driver 13000, torch 2")


def test_a_driver_that_is_not_there_has_no_version() -> None:
    version = verify._driver()
    assert version is None if not torch.cuda.is_available() else version
