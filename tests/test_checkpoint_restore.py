"""Checkpoints of any model: restored into the objects that are there, checked before anything is written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tensor_file import peak_growth
from torch import Tensor, nn

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.tensor_file import TensorFile, load_tensors, save_tensors
from gptcore.training.checkpoint import CheckpointError, _fingerprint, load_into, save_checkpoint, verify_checkpoint
from gptcore.training.optim import AdamW
from gptcore.training.random_state import random_state


class Odd(nn.Module):
    """Unlike a GPT: another constructor, buffers, a scalar, a 16-bit and a transposed weight, tied by name."""

    def __init__(self, width: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.tied = self.inner[0]
        self.scalar = nn.Parameter(torch.tensor(float(seed)))
        self.transposed = nn.Parameter(torch.randn(width, 3, generator=generator).t(), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(width, generator=generator).bfloat16())
        self.frozen = nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
        self.register_buffer("passing", torch.zeros(3), persistent=False)


def stepped(model: nn.Module) -> AdamW:
    """An optimizer of the model after a step with gradients of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=0.1)
    for number, parameter in enumerate(trained):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    return optimizer


def new(model: nn.Module) -> tuple[nn.Module, AdamW]:
    """Another model of the same kind, with other weights, and an optimizer that has not begun."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(-7)
    return other, AdamW([parameter for parameter in other.parameters() if parameter.requires_grad])


def tensors_of(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    states = {
        f"{key}.{name}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | states
    return {name.replace("_orig_mod.", ""): tensor.detach().clone() for name, tensor in named.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    alike = all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a.keys() & b.keys())
    return a.keys() == b.keys() and alike


def save(path: Path, model: nn.Module, optimizer: AdamW) -> Path:
    save_checkpoint(path, model, optimizer, {"state": {}})
    verify_checkpoint(path)
    return path


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))


class Subclass(GPT):
    def __init__(self, extra: int) -> None:
        super().__init__(tiny().config)
        self.adapter = nn.Linear(extra, extra)


@pytest.mark.parametrize("make", [lambda: Odd(5, seed=3), tiny, lambda: tiny().bfloat16(), lambda: Subclass(3)])
def test_restored_into_the_memory_that_is_there(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer = stepped(model)
    path = save(tmp_path / "checkpoint-1", model, optimizer)
    torch.rand(3)
    other, fresh = new(model)
    before = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    load_into(path, other, fresh)
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == before
    assert equal(tensors_of(other, fresh), tensors_of(model, optimizer))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        states = optimizer.state.get(a, {}), fresh.state.get(b, {})
        assert [tensor.stride() for tensor in states[0].values()] == [tensor.stride() for tensor in states[1].values()]


def wrapped(kind: str) -> nn.Module:
    model = tiny()
    if kind == "compiled":
        return torch.compile(model)  # type: ignore[return-value]
    if kind == "compiled part":
        model.h[1] = torch.compile(model.h[1])  # type: ignore[assignment]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["plain", "compiled", "compiled part"])
@pytest.mark.parametrize("resumed", ["plain", "compiled", "compiled part"])
def test_compiled_models_have_the_names_of_plain_ones(tmp_path: Path, saved: str, resumed: str) -> None:
    model = wrapped(saved)
    optimizer = stepped(model)
    path = save(tmp_path / "checkpoint-1", model, optimizer)
    assert not [name for file in path.glob("*.safetensors") for name in load_tensors(file) if "_orig_mod" in name]
    other, fresh = new(wrapped(resumed))
    load_into(path, other, fresh)
    assert equal(tensors_of(other, fresh), tensors_of(model, optimizer))
    read = {f"model.{name}": tensor for name, tensor in GPT.from_pretrained(path).state_dict().items()}
    assert equal(read, tensors_of(other, AdamW(other.parameters())))


def test_no_second_copy_in_memory(tmp_path: Path) -> None:
    model = nn.Linear(3072, 3072)  # 36 MB, and 72 MB of moments
    optimizer = stepped(model)
    save_checkpoint(tmp_path / "checkpoint-1", model, optimizer, {})
    assert peak_growth(lambda: load_into(tmp_path / "checkpoint-1", model, optimizer)) < 20 << 20
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert peak_growth(lambda: save_checkpoint(tmp_path / "checkpoint-1", model, optimizer, {})) < 20 << 20


def rewritten(path: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of a checkpoint under a manifest that matches."""
    if file.endswith(".json"):
        values = json.loads((path / file).read_text())
        change(values)
        (path / file).write_text(json.dumps(values))
    else:
        tensors = load_tensors(path / file)
        change(tensors)
        save_tensors(path / file, tensors)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[file] = _fingerprint(path / file)
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify_checkpoint(path)


W, M, R = "model.safetensors", "optimizer.safetensors", "random_state.json"
MISFITS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (W, lambda t: t.pop("scalar"), "another model than the one to train: scalar is missing in model.safetensors"),
    (W, lambda t: t.update(more=torch.zeros(1)), "another model .*: more is not in this run"),
    (W, lambda t: t.update(scalar=torch.zeros(1)), r"another model .*: scalar is torch.float32 \(1,\) instead of"),
    (W, lambda t: t.update(scalar=t["scalar"].double()), "another model .*: scalar is torch.float64"),
    (W, lambda t: t.update(narrow=t["narrow"].float()), "narrow is torch.float32 .* instead of torch.bfloat16"),
    (M, lambda t: t.pop("exp_avg.scalar"), "exp_avg.scalar is missing in optimizer.safetensors"),
    (M, lambda t: t.pop("master.narrow"), "master.narrow is missing in optimizer.safetensors"),
    (M, lambda t: t.update({"exp_avg.frozen": torch.zeros(5)}), "exp_avg.frozen is not in this run"),
    (M, lambda t: t.update({"x": torch.zeros(5)}), "x is not in this run"),
    (M, lambda t: t.update({"step.scalar": torch.zeros(2)}), r"step.scalar is torch.float32 \(2,\) instead of"),
    (M, lambda t: t.update({"step.scalar": torch.zeros((), dtype=torch.int64)}), "step.scalar is torch.int64"),
    (R, lambda s: s.pop("torch"), "random_state.json is damaged: there is no 'torch'"),
    (R, lambda s: s.update(python=None), "random_state.json is damaged"),
    (R, lambda s: s.update(torch="00"), "random_state.json is damaged"),
    (R, lambda s: s.update(numpy=["MT19937", "zz", 0, 0, 0.0]), "random_state.json is damaged"),
]


@pytest.mark.parametrize("number", range(len(MISFITS)))
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, number: int) -> None:
    file, change, expected = MISFITS[number]
    model = Odd(5, seed=3)
    path = save(tmp_path / "checkpoint-1", model, stepped(model))
    rewritten(path, file, change)
    other, fresh = new(model)
    before, generators = tensors_of(other, fresh), random_state()
    with pytest.raises(CheckpointError, match=expected):
        load_into(path, other, fresh)
    assert equal(tensors_of(other, fresh), before)
    assert random_state() == generators


def test_parameters_that_had_no_gradient_are_named(tmp_path: Path) -> None:
    model = Odd(5, seed=3)
    path = save(tmp_path / "checkpoint-1", model, stepped(model))
    other, _ = new(model)
    with pytest.warns(UserWarning, match=r"no state for 2 trained parameters \(transposed, frozen\)"):
        load_into(path, other, AdamW(other.parameters()))


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd(5, seed=3)
    path = save(tmp_path / "checkpoint-1", model, stepped(model))
    real = TensorFile.copy_to

    def cut_and_copy(file: TensorFile, name: str, target: Tensor) -> None:
        (path / W).write_bytes((path / W).read_bytes()[:-1])
        real(file, name, target)

    monkeypatch.setattr(TensorFile, "copy_to", cut_and_copy)
    with pytest.raises(CheckpointError, match=r"cannot be resumed: .*model\.safetensors was changed while it was read"):
        load_into(path, *new(model))
