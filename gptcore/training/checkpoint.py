"""Checkpoints: folders from which training goes on bit for bit; whole or absent; checked before use; no pickle.

    checkpoint-<step>/
      config.json  model.safetensors   the model, by model.save_pretrained
      tokenizer.json                   the tokenizer, by tokenizer.save_pretrained, if the trainer has one
      optimizer.safetensors            exp_avg.<parameter>, exp_avg_sq.<parameter> and step.<parameter>
      random_state.json                the generators of Python, NumPy and PyTorch
      trainer_state.json               step, epoch, the sums behind the logged means, arguments, data position, versions
      manifest.json                    bytes and SHA-256 of each of the files above; written last

A folder is written aside under a name that starts with a dot, flushed to the disk and renamed; it is deleted the other
way round. A kill at any moment therefore leaves every checkpoint whole or absent; what it left aside is swept on the
next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gptcore.files import PathLike, atomic_directory, naming, read_json, write_json
from gptcore.tensor_file import TensorFile, save_tensors
from gptcore.training.optim import AdamW
from gptcore.training.random_state import random_state, set_random_state

FORMAT = 1  # of the folder as a whole; one that this code does not know is refused
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = {"model.safetensors", "optimizer.safetensors", "random_state.json", "trainer_state.json"}


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, does not fit the run, or could not be written."""


# ---- the folders of one run ------------------------------------------------------------------------------------------


def checkpoint_step(path: PathLike) -> int:
    """The step in the folder's name: 500 for `checkpoint-500`, -1 for any other name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: PathLike) -> list[Path]:
    """The folders `checkpoint-<digits>` in `output_dir`, by step, the newest last. Damaged ones are among them."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(folders, key=checkpoint_step)


def newest_checkpoint(output_dir: PathLike) -> Path:
    """The newest whole checkpoint in `output_dir`; a warning names each newer one that is damaged.

    Raises CheckpointError if there is none.
    """
    damages = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            warnings.warn(f"{damage}; passed over for {path}", stacklevel=2)
        return path
    reasons = "; ".join(damages) or "it holds no folder checkpoint-<step>; train without resuming to start there"
    raise CheckpointError(f"no checkpoint in {output_dir} can be resumed: {reasons}")


def is_ours(path: Path) -> bool:
    """Whether we wrote this folder and may delete it: the manifest is in it from the moment it has its name."""
    return checkpoint_step(path) >= 0 and (path / "manifest.json").is_file()


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a kill at any moment leaves it whole or gone (and something aside for `sweep`)."""
    aside = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.rename(path, aside)  # an empty folder may be renamed over
    shutil.rmtree(aside)


def rotate_checkpoints(output_dir: PathLike, limit: int, newest: int, best: int | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never those of the steps `newest` and `best`.

    So with limit=1 two stay if the best is not the newest. Checkpoints of later steps (left by a run that was resumed
    from further back, because they were damaged) neither count nor go: training replaces them when it gets there.
    """
    ours = [path for path in list_checkpoints(output_dir) if is_ours(path) and checkpoint_step(path) <= newest]
    excess = max(0, len(ours) - limit)
    for path in [path for path in ours if checkpoint_step(path) not in (newest, best)][:excess]:
        remove_checkpoint(path)


def sweep(output_dir: PathLike) -> None:
    """Delete what a killed run left aside in `output_dir`. Only for the holder of `exclusive(output_dir)`."""
    for name in (
        "checkpoint-*",
        "log.jsonl",
        "*.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        for path in Path(output_dir).glob(f".{name}.*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def exclusive(output_dir: PathLike) -> Iterator[None]:
    """Hold `output_dir` (made if absent) for this process alone; the kernel lets go of it when the process dies.

    Raises CheckpointError if another process holds it: two runs would sweep and rotate each other's checkpoints.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"another process is training into {output_dir}; stop it or use another folder") from None
    try:
        yield
    finally:
        os.close(descriptor)


# ---- one checkpoint --------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: PathLike, model: nn.Module, optimizer: AdamW, state: dict[str, Any], tokenizer: Any = None
) -> None:
    """Write a checkpoint folder, whole or not at all; one that has the name already is replaced.

    Tensors have the model's own names, or those that its `stored_as` states; `state` is JSON.
    Raises CheckpointError if the disk does not take it (full, say); every other checkpoint is then as it was.
    """
    path = Path(path)
    moments = {
        f"{key}.{own_name(name)}": tensor
        for name, parameter in model.named_parameters()  # a tied parameter has one name here
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    try:
        if path.exists():
            remove_checkpoint(path)
        with atomic_directory(path) as aside:
            _save_model(model, aside)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            save_tensors(aside / "optimizer.safetensors", moments)
            write_json(aside / "random_state.json", random_state())
            write_json(aside / "trainer_state.json", {"format": FORMAT, **state})
            files = sorted(file for file in aside.rglob("*") if file.is_file())
            write_json(aside / "manifest.json", {str(file.relative_to(aside)): _fingerprint(file) for file in files})
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"{path} could not be written: {error} ({free:,} bytes are free there). "
            "The checkpoints before it are untouched: make room and resume from the newest of them"
        ) from error


def _save_model(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors and, where the model has a config, config.json."""
    if hasattr(model, "stored_as"):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    save_tensors(folder / "model.safetensors", named_tensors(model))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        write_json(folder / "config.json", config.to_dict())


def verify_checkpoint(path: PathLike) -> None:
    """Raise CheckpointError, naming the file and the numbers, unless every file is there, bit for bit as written."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    try:
        manifest = read_json(path / "manifest.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for name in sorted(_NEEDED | manifest.keys()):
        expected = manifest.get(name)
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise CheckpointError(f"{path} is damaged: {name} cannot be read: {error}") from error
        if found != expected:
            raise CheckpointError(f"{path} is damaged: {name} should have {expected}, but has {found}")


def read_state(path: PathLike) -> dict[str, Any]:
    """The `state` that a verified checkpoint was saved with. Raises CheckpointError for one of another format."""
    state = read_json(Path(path) / "trainer_state.json")
    if state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is of another format than {FORMAT}, the one that this version of gptcore reads")
    return state


def load_into(path: PathLike, model: nn.Module, optimizer: AdamW) -> None:
    """Restore the weights, the optimizer's state and the random state of a verified checkpoint into these objects.

    Tensors are read one by one into the memory that the model and the optimizer have. Raises CheckpointError if names,
    shapes or dtypes differ or a file is damaged, before the first of them is written; and if a file changes while it is
    read, when some are. Warns of trained parameters for which the checkpoint has no optimizer state.
    """
    path = Path(path)
    try:
        generators = read_json(path / "random_state.json")
        with (
            TensorFile(path / "model.safetensors") as weights,
            TensorFile(path / "optimizer.safetensors") as moments,
        ):
            layout = layout_of(model)
            targets = {
                layout[name][0]: tensor.t() if layout[name][1] else tensor
                for name, tensor in named_tensors(model).items()
            }
            _check_fit(f"{path} holds another model than the one to train", weights, targets)
            states = _optimizer_state(moments, model, optimizer)
            _check_fit(f"{path} holds optimizer state for another model than the one to train", moments, states)
            with naming(path / "random_state.json"):
                set_random_state(generators)
            for file, tensors in ((weights, targets), (moments, states)):
                for name, tensor in tensors.items():
                    file.copy_to(name, tensor)
    except (OSError, ValueError) as error:
        optimizer.state.clear()
        raise CheckpointError(f"{path} cannot be resumed: {error}") from error


def own_name(name: str) -> str:
    """Return the name of a parameter without what torch.compile put into it."""
    return name.replace("_orig_mod.", "")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint has of a model, under its own names: parameters and persistent buffers, each once."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; checkpoints hold tensors only")
        if id(tensor) not in seen:
            tensors[own_name(name)] = tensor.detach()
        seen.add(id(tensor))
    return tensors


def layout_of(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Return for each of the model's own names the name in model.safetensors, and whether it is transposed there.

    A model whose save_pretrained writes other names than its own says so by a method `stored_as`, as GPT has.
    """
    if hasattr(model, "stored_as"):
        return {own_name(name): stored for name, stored in model.stored_as().items()}  # type: ignore[operator]
    return {name: (name, False) for name in named_tensors(model)}


def _optimizer_state(file: TensorFile, model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Return the tensors, made anew, of the parameters that have optimizer state in the file, by their names there."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stored = {name.partition(".")[2] for name in file.entries}
    optimizer.state.clear()
    states: dict[str, Tensor] = {}
    without = []
    for full_name, parameter in model.named_parameters():  # a tied parameter has one name here
        name = own_name(full_name)
        if id(parameter) in trained:
            if name in stored:
                states |= {f"{key}.{name}": tensor for key, tensor in optimizer.init_state(parameter).items()}
            else:
                without.append(name)
    if without and stored:
        warnings.warn(
            f"{file.path} has no state for {len(without)} trained parameters ({', '.join(without[:3])}): they had no "
            "gradient before, so their moments begin at zero",
            stacklevel=4,
        )
    return states


def _check_fit(what: str, file: TensorFile, targets: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the file has these tensors and no other, in the same shapes and dtypes."""
    wrong = [f"{name} is missing in {file.path.name}" for name in sorted(targets.keys() - file.entries.keys())]
    wrong += [f"{name} is not in this run" for name in sorted(file.entries.keys() - targets.keys())]
    for name in sorted(targets.keys() & file.entries.keys()):
        entry, tensor = file.entries[name], targets[name]
        if (entry.shape, entry.dtype) != (tuple(tensor.shape), tensor.dtype):
            wrong.append(f"{name} is {entry.dtype} {entry.shape} instead of {tensor.dtype} {tuple(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{what}: {'; '.join(wrong[:3])}{more}")


def _fingerprint(file: Path) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
