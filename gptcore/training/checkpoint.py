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
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gptcore.files import PathLike, atomic_directory, read_json, write_json
from gptcore.tensor_file import load_tensors, save_tensors

FORMAT = 1  # of the folder as a whole; one that this code does not know is refused
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = {"config.json", "model.safetensors", "optimizer.safetensors", "random_state.json", "trainer_state.json"}
_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step", "master")  # the last of 16-bit parameters only


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
    path: PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], tokenizer: Any = None
) -> None:
    """Write a checkpoint folder, whole or not at all; one that has the name already is replaced.

    `model` has save_pretrained(dir); the optimizer is an Adam, its state is stored by parameter name; `state` is JSON.
    Raises CheckpointError if the disk does not take it (full, say); every other checkpoint is then as it was.
    """
    path = Path(path)
    moments = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()  # a tied parameter has one name here
        if parameter in optimizer.state
        for key in _ADAM_STATE
        if key in optimizer.state[parameter]
    }
    try:
        if path.exists():
            remove_checkpoint(path)
        with atomic_directory(path) as aside:
            model.save_pretrained(aside)  # type: ignore[operator]
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


def load_checkpoint(path: PathLike, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights, the optimizer's state and the random state of a verified checkpoint in place.

    Raises CheckpointError if the model or the optimizer has other tensors than the checkpoint.
    """
    path = Path(path)
    saved = type(model).from_pretrained(path)  # type: ignore[attr-defined]  # it knows names and layout on the disk
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another model than the one to train: {error}") from error
    tensors = load_tensors(path / "optimizer.safetensors")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors and id(parameter) in trained:
            # Cloned: a loaded tensor may be a view of the file.
            keys = [key for key in _ADAM_STATE if f"{key}.{name}" in tensors]
            state = {key: tensors.pop(f"{key}.{name}").to(parameter.device, copy=True) for key in keys}
            optimizer.state[parameter] = state
    if tensors:
        raise CheckpointError(
            f"{path} holds optimizer state for what this run does not train: {sorted(tensors)[:3]} ..."
        )
    set_random_state(read_json(path / "random_state.json"))  # last: building a model draws random numbers


def _fingerprint(file: Path) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


# ---- random state ----------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of every global generator that training may draw from, as JSON: words as hexadecimal text."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (a dataset may use it)
    return {
        "python": [version, np.asarray(words, "<u4").tobytes().hex(), gauss],
        "numpy": [str(kind), np.asarray(keys, "<u4").tobytes().hex(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in _cuda_states()],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo everything that was drawn since `state = random_state()`."""

    def words(text: str) -> Any:
        return np.frombuffer(bytes.fromhex(text), "<u4")

    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    version, python_words, gauss = state["python"]
    random.setstate((version, tuple(words(python_words).tolist()), gauss))
    kind, numpy_words, *rest = state["numpy"]
    np.random.set_state((kind, words(numpy_words), *rest))  # noqa: NPY002
    torch.set_rng_state(tensor(state["torch"]))
    for device, text in enumerate(state["cuda"][: len(_cuda_states())]):
        torch.cuda.set_rng_state(tensor(text), device)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (of every device)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Inside, the global generators start from `seed`; afterwards they are as if nothing had been drawn."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
