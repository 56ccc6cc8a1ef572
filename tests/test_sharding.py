"""FSDP over gloo: models built in parts, precisions, adapters, checkpoints as those of one process."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import NEW, alone, check_close, command, kill, processes, run, tensors
from tiny_run import exact, losses, tiny_gpt, tiny_trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptcore import GPT, GPTConfig
from gptcore.cli import main
from gptcore.export import export_gguf
from gptcore.hf.pretrained import load_config
from gptcore.lora import add_adapter, load_adapter
from gptcore.tensor_file import load_tensors
from gptcore.text.tokenizer import Tokenizer
from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.sharding import sharded_model
from gptcore.training.trainer import Trainer

pytestmark = pytest.mark.slow

__all__ = ["alone", "command"]


def whole_tensors_one_by_one(rank: int, trainer: Trainer) -> None:
    """Fail if a process holds two whole tensors at a time, as it would to hold the whole model; kill rank 1 later."""
    gather, held = DTensor.full_tensor, []

    def full_tensor(self: DTensor) -> torch.Tensor:
        assert not any(reference() is not None for reference in held)
        found = gather(self)
        held.append(weakref.ref(found))
        return found

    DTensor.full_tensor = full_tensor
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    kill(rank, trainer, victim=1, step=7)


def test_fsdp_is_killed_and_one_process_resumes(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    codes, errors = run(folder, 2, whole_tensors_one_by_one, parallel="fsdp")
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"ProcessGroupError: .*rank 1 \(process \d+ on .* has ended", errors[0]), errors[0]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-5"]
    assert run(folder, 1, resume=True) == ([0], [""])
    check_close(folder, alone, rel=1e-4)


class Compiled(TrainerCallback):
    def on_train_end(self, trainer: Trainer) -> None:
        assert sum(torch._dynamo.utils.counters["frames"].values()) > 0


def check_compiled(rank: int, trainer: Trainer) -> None:
    trainer.callbacks.append(Compiled())


@pytest.mark.parametrize(
    ("changes", "rel"), [({"torch_compile": True}, 1e-4), ({"bf16": True}, 0.05), ({"fp16": True}, 0.02)]
)
def test_fsdp_resumes_what_one_process_began(tmp_path: Path, alone: Path, changes: dict[str, Any], rel: float) -> None:
    """Mixed precision by FSDP's policy has 16 bits for weights and activations, and float32 for sums of gradients."""
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    for path in list_checkpoints(folder)[2:]:
        shutil.rmtree(path)
    prepare = check_compiled if "torch_compile" in changes else None
    assert run(folder, 2, prepare, resume=True, parallel="fsdp", **changes) == ([0, 0], ["", ""])
    check_close(folder, alone, rel)


def overflow(rank: int, trainer: Trainer) -> None:
    """Make the loss of the last process infinite in one step."""
    if rank == trainer.processes.count - 1:
        compute = trainer.loss_of
        trainer.loss_of = lambda batch: compute(batch) * (math.inf if trainer.state.global_step == 6 else 1.0)


@pytest.mark.parametrize("parallel", ["data", "fsdp"])
def test_processes_agree_to_skip_an_overflow(tmp_path: Path, parallel: str) -> None:
    settings = {"fp16": True, "max_steps": 9, "eval_steps": 9, "save_steps": 9}
    for name, count, changes in (("one", 1, {}), ("two", 2, {"parallel": parallel})):
        assert run(tmp_path / name, count, overflow, **settings, **changes) == ([0] * count, [""] * count)
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert [entry["overflow_steps"] for entry in two if "loss" in entry] == [0, 0, 1]
    assert [entry["loss_scale"] for entry in two if "loss" in entry] == [65536.0, 65536.0, 32768.0]
    if parallel == "data":
        assert one == two
        assert exact(tmp_path / "one" / "checkpoint-9") == exact(tmp_path / "two" / "checkpoint-9")


def count_messages(rank: int, trainer: Trainer) -> None:
    """Fail unless the sums of gradients are sent after the last micro-batch of a step only."""
    sent: list[str] = []
    at: list[int] = []  # when each micro-batch begins
    for name in ("all_to_all_single", "reduce_scatter_tensor", "reduce_scatter_single"):
        if (send := getattr(dist, name, None)) is not None:

            def counted(*args: Any, send: Any = send, name: str = name, **options: Any) -> Any:
                sent.append(name)
                return send(*args, **options)

            setattr(dist, name, counted)
    compute = trainer.loss_of

    def loss_of(batch: Any) -> torch.Tensor:
        if trainer.model.training:
            at.append(len(sent))
        return compute(batch)

    class Check(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            assert len(at) == 4  # of 8, for each of two processes
            assert len(set(at)) == 1
            assert len(sent) > at[0]
            at.clear()

    trainer.loss_of = loss_of
    trainer.callbacks.append(Check())


@pytest.mark.parametrize("parallel", ["data", "fsdp"])
def test_accumulation_communicates_once_a_step(tmp_path: Path, parallel: str) -> None:
    settings = {"parallel": parallel, "max_steps": 2, "eval_steps": 2, "save_steps": 2}
    assert run(tmp_path / "run", 2, count_messages, **settings) == ([0, 0], ["", ""])


def add(model: GPT) -> GPT:
    add_adapter(model, r=2, dora=True, target_modules="all-linear", modules_to_save=["ln_f"],
                trainable_token_indices=[1, 5])  # fmt: skip
    return model


def adapted(args: TrainingArguments) -> nn.Module:
    return add(tiny_gpt())


class SaveAtEnd(TrainerCallback):
    def on_train_end(self, trainer: Trainer) -> None:
        trainer.save_model()


def save_at_end(rank: int, trainer: Trainer) -> None:
    trainer.callbacks.append(SaveAtEnd())


def in_parts(args: TrainingArguments, weights: Path | None = None, make: Callable[[], GPT] = tiny_gpt) -> nn.Module:
    """Build a model for FSDP, and compare its bits with those of one that was built whole."""
    torch.manual_seed(1)
    model = sharded_model(make, args, "cpu", weights)
    torch.manual_seed(1)
    whole = make()
    if weights is not None:
        torch.manual_seed(1)
        dtype = whole.wte._parameters["weight"].dtype
        whole = (add if hasattr(whole, "adapters") else lambda model: model)(GPT.from_pretrained(weights, dtype=dtype))
    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), expected[name]), name
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in whole.named_parameters()
    ]
    return model


def adapted_in_parts(args: TrainingArguments, gguf: Path) -> nn.Module:
    """Build models with adapters: one with the weights of a GGUF file, and the new one that is returned."""
    in_parts(args, gguf, lambda: add(GPT(load_config(gguf))))
    return in_parts(args, make=lambda: add(tiny_gpt()))


def test_fsdp_builds_adapters_in_parts_and_trains_them(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 9)
    model = GPT(GPTConfig(vocab_size=260, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    export_gguf(model, Tokenizer.train(tmp_path / "text.txt", 260), tmp_path / "model.gguf", "bf16")
    parts = functools.partial(adapted_in_parts, gguf=tmp_path / "model.gguf")
    for name, count, changes in (("one", 1, {"make": adapted}), ("two", 2, {"parallel": "fsdp", "make": parts})):
        found = run(tmp_path / name, count, save_at_end, max_steps=6, **changes)
        assert found == ([0] * count, [""] * count)
    check_close(tmp_path / "two", tmp_path / "one", rel=1e-4)
    mine, theirs = (load_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)
    with torch.device("meta"):
        model = tiny_gpt()
    with pytest.raises(ValueError, match="the model has no memory yet, on the meta device, so no adapter can be"):
        load_adapter(model, tmp_path)


def test_fsdp_builds_a_model_in_parts(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, 2, parallel="fsdp", make=in_parts) == ([0, 0], ["", ""])
    check_close(folder, alone, rel=1e-4)
    weights = functools.partial(in_parts, weights=alone / "checkpoint-5")
    short = {"parallel": "fsdp", "max_steps": 1, "eval_steps": 1, "save_steps": 0}
    assert run(tmp_path / "other", 2, make=weights, **short)[0] == [0] * 2


class Alive(TorchDispatchMode):
    """Count the bytes of the tensors that are made in this process and not freed, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor goes on with the tensors that it holds
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())

    def change(self, count: int) -> None:
        self.bytes += count
        self.peak = max(self.peak, self.bytes)


DEEP = GPTConfig(vocab_size=32, n_positions=8, n_embd=16, n_layer=12, n_head=2)


def measured(args: TrainingArguments, weights: Path) -> nn.Module:
    """Build the model from new weights and from those of a folder: half of it, and copies of one tensor at a time."""
    whole, largest = 4 * DEEP.num_parameters, 4 * 4 * DEEP.n_embd**2
    for source in (None, weights):
        with Alive() as alive:
            model = sharded_model(lambda: GPT(DEEP), args, "cpu", source)
        assert whole / 2 <= alive.bytes < alive.peak, "the half that this process keeps was not seen"
        assert alive.peak <= whole / 2 + 6 * largest < 0.7 * whole, f"{alive.peak} bytes of {whole} from {source}"
        del model
    os._exit(0)


def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    GPT(DEEP).save_pretrained(tmp_path / "model")
    make = functools.partial(measured, weights=tmp_path / "model")
    assert run(tmp_path / "run", 2, parallel="fsdp", make=make) == ([0, 0], ["", ""])


def test_fsdp_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parallel is 'fsdp', but there is 1 process; start several with torchrun"):
        tiny_trainer(tmp_path / "run", parallel="fsdp")


def work_by_command(rank: int, folder: Path, options: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=2)
    os._exit(main([*options, "--gradient-accumulation-steps", "2"]))


def test_the_command_line_shards_new_models_and_old_ones(tmp_path: Path, command: list[str]) -> None:
    for name, options in (("new", NEW), ("old", ["--init-from", str(tmp_path / "new one")])):
        one, two = ([*command, *options, "--output-dir", str(tmp_path / f"{name} {count}")] for count in ("one", "two"))
        assert main([*one, "--gradient-accumulation-steps", "2"]) == 0
        arguments = (tmp_path / f"{name} group", [*two, "--parallel", "fsdp"])
        members = [processes.Process(target=work_by_command, args=(rank, *arguments)) for rank in range(2)]
        for member in members:
            member.start()
        for member in members:
            member.join(60)
        assert [member.exitcode for member in members] == [0, 0]
        mine, theirs = (tensors(tmp_path / f"{name} {count}" / "checkpoint-2") for count in ("two", "one"))
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-5)
