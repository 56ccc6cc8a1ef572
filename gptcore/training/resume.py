"""Rules of resuming: which checkpoint, whether the run has changed, and what output_dir may hold at the start."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gptcore import _C, ops
from gptcore.data.datasets import fingerprint_of
from gptcore.files import (
    PathLike,
    absolute,
    check_replaceable,
    entry,
    from_json,
    read_json,
    remove,
    temporary_name,
    write_json,
)
from gptcore.hf.pretrained import PICKLES, SAFETENSORS
from gptcore.lora.adapters import Adapters
from gptcore.lora.files import WEIGHTS
from gptcore.training import checkpoint
from gptcore.training.arguments import TrainingArguments
from gptcore.training.checkpoint import CheckpointError
from gptcore.training.distributed import ProcessGroupError, launch, restarts
from gptcore.training.state import TrainerState

Description = dict[str, dict[str, Any]]
NEWER: dict[str, Any] = {  # parts of TrainerState that older checkpoints lack
    "skipped_steps": 0, "overflow_steps": 0, "scaler": {}, "best_evaluated": None, "evaluations_since": 0,
    "improved": True, "lowest_loss": None,
}  # fmt: skip
SAMPLED = 64  # examples that stand for a dataset without a fingerprint

# ---- the folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process. A folder that did not exist is removed again if nothing was written."""
    new = not folder.exists()
    try:
        with checkpoint.exclusive(folder):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def choose_checkpoint(folder: Path, resume_from: Literal[True] | PathLike) -> Path:
    """Return the verified checkpoint to resume from: for True the newest in `folder`, else the one at a path.

    Raises CheckpointError if there is no checkpoint, if it is damaged, or if `folder` has a newer one.
    """
    if resume_from is True:
        return checkpoint.newest_checkpoint(folder)
    path = absolute(resume_from)
    checkpoint.verify_checkpoint(path)
    if is_in(path, folder) and path.name != (newest := checkpoint.newest_checkpoint(folder)).name:
        raise CheckpointError(
            f"{path} is not the newest checkpoint of its run, {newest} is whole: the log would hold two courses of one "
            "run; choose another output_dir, or delete the newer checkpoints"
        )
    return path


def earlier_run(folder: Path, resumed: Path | None, overwrite: bool) -> list[Path]:
    """Return checkpoints and log of another run in `folder`, to be deleted before this run starts.

    Raises FileExistsError without `overwrite` if there are any, or a model; and for a checkpoint-N of another program,
    and a log.jsonl that is not a regular file.
    """
    check_replaceable(folder / "log.jsonl")
    inside = resumed is not None and is_in(resumed, folder)
    checkpoint.check_unobstructed(folder, checkpoint.checkpoint_step(resumed) if inside and resumed else -1)
    if inside:
        return []
    earlier = [*checkpoint.list_checkpoints(folder), *folder.glob("log.jsonl")]
    model = model_files(folder)
    if (earlier or model) and not overwrite:
        what = "an earlier run" if earlier else "a model"
        held = f"{folder} holds {what} ({', '.join(path.name for path in [*earlier, *model][:4])})"
        if resumed is not None:
            held += f", and {resumed} is not one of its checkpoints"
        elif checkpoint.list_checkpoints(folder):
            held += "; resume it with resume_from_checkpoint=True"
        raise FileExistsError(f"{held}; delete it with overwrite_output_dir=True, or choose another output_dir")
    return earlier


def model_files(folder: PathLike) -> list[Path]:
    """Return the config and weight files in a folder, of gptcore or another program."""
    names = ["config.json", "hparams.json", *SAFETENSORS, *PICKLES, WEIGHTS]
    return [path for name in names if os.path.lexists(path := Path(folder, name))]


def write_run(folder: Path, description: Description) -> None:
    """Write run.json: what the run in `folder` was last started with."""
    try:
        write_json(folder / "run.json", {**description, "launch": launch()})
    except OSError as error:
        raise CheckpointError(f"{folder / 'run.json'} could not be written: {error}") from error


def restarted(folder: Path) -> bool:
    """Return whether torchrun has started the run in `folder` anew."""
    try:
        return restarts() > 0 and read_json(folder / "run.json").get("launch") == launch()
    except (OSError, ValueError):
        return False


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Raise CheckpointError if the tokenizer cannot be saved in `folder`, which is left as it is."""
    aside = temporary_name(folder / "tokenizer")
    try:
        aside.mkdir()
        tokenizer.save_pretrained(aside)
    except Exception as error:
        raise CheckpointError(f"the {type(tokenizer).__name__} cannot be saved in {folder}: {error}") from error
    finally:
        remove(aside)


def check_room(folder: Path, model: nn.Module, saves: bool) -> None:
    """Raise CheckpointError if a checkpoint does not fit on the disk; without `saves`, warn."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = sum(parameter.numel() * (12 if parameter.itemsize == 2 else 8) for parameter in trained)
    needed = moments + sum(tensor.nbytes for tensor in checkpoint.named_tensors(model).values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"a checkpoint takes {needed:,} bytes, but only {free:,} are free in {folder}; make room there"
        if saves:
            raise CheckpointError(f"{text}, or choose another output_dir")
        warnings.warn(f"{text}: if training is interrupted, it cannot be saved", stacklevel=4)


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model whose checkpoints would not hold all of its parameters."""
    stored = checkpoint.named_tensors(model)
    held = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    if absent := [name for name, parameter in model.named_parameters() if id(parameter) not in held]:
        raise ValueError(
            f"{absent[0]} is a parameter of the model, but not in its state_dict ({len(stored)} tensors), so that a "
            "checkpoint could not restore it"
        )


def delete_run(paths: Iterable[Path]) -> None:
    """Delete what earlier_run returned."""
    for path in paths:
        if path.is_dir():
            checkpoint.remove_checkpoint(path)
        else:
            remove(path)


def is_in(path: Path, folder: Path) -> bool:
    return path.parent.resolve() == folder.resolve()  # a link there is of this run, too


# ---- the run ---------------------------------------------------------------------------------------------------------


def describe_run(
    args: TrainingArguments,
    model: nn.Module,
    data: dict[str, Any],
    total_steps: int,
    device: torch.device,
    tokenizer: Any = None,
) -> Description:
    """Return all that determines a run beside its state; each checkpoint stores it, and resuming compares it."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", lambda: {"class": type(model).__qualname__})
    adapters: Adapters | None = getattr(model, "adapters", None)
    configs = {} if adapters is None else {name: dataclasses.asdict(made) for name, made in adapters.configs.items()}
    description: Description = {
        "args": dataclasses.asdict(args),
        "data": data,
        "schedule": {"total_steps": total_steps},
        "model": to_dict() | ({} if adapters is None else {"adapters": configs, "adapter": adapters.active}),
        "environment": {
            "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
            "device": device.type, "threads": torch.get_num_threads(),
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, kernels {_C.cpu_isa()}",
            "backend": ops.chosen("attention", next(model.parameters()))[0],
            "code": code_version(), "vocabulary": getattr(tokenizer, "fingerprint", None),
        },
    }  # fmt: skip
    read_back: Description = json.loads(json.dumps(description, default=str))  # as a checkpoint will have it
    return read_back


@functools.cache
def code_version() -> str:
    """Return the SHA-256 of the Python files of gptcore."""
    root = Path(__file__).parents[1]
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def compare_processes(descriptions: list[Description]) -> None:
    """Raise ProcessGroupError if a process has other data, arguments, versions, code or vocabulary than rank 0."""
    first = descriptions[0]
    differing = []
    for rank, other in enumerate(descriptions):
        differing += [
            f"{name} is {other[part].get(name)!r} on rank {rank}, but {first[part].get(name)!r} on rank 0"
            for part in first
            for name in first[part] | other[part]
            if first[part].get(name) != other[part].get(name) and name not in ("output_dir", "disable_tqdm")
        ]
    if differing:
        raise ProcessGroupError(f"processes of one run must not differ, but {'; '.join(differing[:4])}")


def read_state(path: Path) -> tuple[TrainerState, Description]:
    """Return state and description of a verified checkpoint. Raises CheckpointError if they were edited."""
    saved, where = checkpoint.read_state(path), path / "trainer_state.json"
    try:
        for part in ("args", "data", "schedule", "model", "environment"):
            entry(saved, part, dict, where)
        values = entry(saved, "state", dict, where)
        sums = {name: {"padding": 0, **entry(values, name, dict, where)} for name in ("total", "window")}
        state = from_json(TrainerState, {**NEWER, **values, **sums}, where)  # older checkpoints have none
        if state.global_step < 1 or checkpoint.checkpoint_step(path) not in (-1, state.global_step):  # -1: renamed
            raise ValueError(f"{where} is of step {state.global_step}, but the folder is {path.name}")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return state, saved


def compare(path: Path, saved: Description, now: Description, args: TrainingArguments) -> None:
    """Raise CheckpointError if data or batches differ; warn of all else that changes the course of the run."""
    rules = {field.name: field.metadata["resume"] for field in dataclasses.fields(args)}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}  # of an older checkpoint
    rules |= dict.fromkeys(now["data"], "same")
    if args.lr_scheduler_type == "constant":
        rules["total_steps"] = "free"
    changes: dict[str, list[str]] = {"same": [], "warn": [], "free": []}
    for part in now:
        for name in saved[part] | now[part]:
            before, after = saved[part].get(name, defaults.get(name)), now[part].get(name)
            older = name not in saved[part] and part in ("data", "environment")  # a checkpoint that has less
            if before != after and not older:
                changes[rules.get(name, "warn")].append(f"{name} {before!r} -> {after!r}")
    if changes["same"]:
        raise CheckpointError(f"{path} cannot be resumed with other data or batches: {'; '.join(changes['same'])}")
    if changes["warn"]:
        text = f"from {path} the run takes another course than it would have: {'; '.join(changes['warn'])}"
        warnings.warn(text, stacklevel=5)
    if "fingerprint" in saved["data"] and is_sampled(now["data"]["fingerprint"]):
        warnings.warn(
            f"train_dataset has no attribute `fingerprint`: {SAMPLED} of its {now['data']['examples']} examples are "
            f"those of {path}, but a change of the others goes unnoticed",
            stacklevel=5,
        )


# ---- the data --------------------------------------------------------------------------------------------------------


def digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of the values of some batches."""
    sha = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            if isinstance(value, torch.Tensor):
                sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                sha.update(repr(value).encode())
    return sha.hexdigest()


def fingerprint(dataset: Any, collate: Callable[[list[int]], Mapping[str, Any]]) -> str:
    """Return the dataset's own fingerprint, or else the SHA-256 of up to 64 examples.

    Examples come in batches of one from `collate`.
    """
    if (own := fingerprint_of(dataset)) is not None:
        return own
    count = len(dataset)
    chosen = range(count) if count <= SAMPLED else [i * (count - 1) // (SAMPLED - 1) for i in range(SAMPLED)]
    return f"{len(chosen)} of {count} examples: {digest(collate([i]) for i in chosen)}"


def is_sampled(fingerprint: str) -> bool:
    """Return whether a fingerprint leaves out examples."""
    return fingerprint.startswith(f"{SAMPLED} of ") and not fingerprint.startswith(f"{SAMPLED} of {SAMPLED} ")
