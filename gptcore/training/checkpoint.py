"""Checkpoints: folders from which training resumes bit-exactly; complete or absent; checked before use; no pickle.

    checkpoint-<step>/
      model.safetensors  config.json   the model's tensors, and its config if it has one
      tokenizer.json                   the tokenizer, by tokenizer.save_pretrained, if the trainer has one
      optimizer.safetensors            exp_avg.<parameter>, exp_avg_sq.<parameter>, step.<parameter>, master.<parameter>
      random_state.json                the generators of Python, NumPy and PyTorch
      trainer_state.json               step, epoch, the sums behind the logged means, arguments, data position, versions
      manifest.json                    bytes and SHA-256 of each of the files above; written last

A folder is written under a temporary name, flushed to the disk and renamed; it is renamed before it is deleted. A kill
at any moment therefore leaves every checkpoint complete or absent; temporary folders are swept on the next start.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gptcore.files import (
    PathLike,
    absolute,
    atomic_directory,
    entry,
    holds,
    kind_of,
    lock,
    make_folder,
    naming,
    open_file,
    read_json,
    remove,
    sweep,
    temporary_name,
    unlock,
    write_json,
)
from gptcore.tensor_file import TensorFile, save_tensors
from gptcore.training.optim import AdamW
from gptcore.training.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from gptcore.training.sharding import Shards

FORMAT = 1  # of the folder as a whole; one that this code does not know is refused
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_NEEDED = {"model.safetensors", "optimizer.safetensors", "random_state.json", "trainer_state.json"}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, does not fit the run, or could not be written."""


# ---- the folder of a run ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(output_dir: PathLike, nested: bool = False) -> Iterator[None]:
    """Hold `output_dir` (made if absent) for this process alone; everything of a run is written inside.

    The kernel releases it when the process dies, whether or not forked children live on. nested: do nothing if this
    process holds it already. Raises CheckpointError if another run holds it, and for a folder that cannot be written.
    """
    descriptor = None
    try:
        folder = make_folder(absolute(output_dir)).resolve()
        held = nested and holds(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "this user may not write there, or the disk is read-only", str(folder))
        if not held and (descriptor := lock(folder)) is None:
            raise CheckpointError(f"another process is training into {output_dir}; stop it or use another folder")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise CheckpointError(f"{output_dir} cannot be written to: {error}; choose another folder") from error
        reason = f"the file system of {output_dir} has no locks ({error}): make sure that no other run writes there"
        warnings.warn(reason, stacklevel=3)
    try:
        if descriptor is not None:
            sweep(folder)
        yield
    finally:
        if descriptor is not None:
            unlock(descriptor)


def checkpoint_step(path: PathLike) -> int:
    """Return the step in the folder's name: 500 for `checkpoint-500`, -1 for any other name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: PathLike) -> list[Path]:
    """Return the folders `checkpoint-<step>` in `output_dir`, the newest last; damaged ones are among them."""
    return [path for path in _named(output_dir) if path.is_dir()]


def _named(output_dir: PathLike) -> list[Path]:
    """Return what is named `checkpoint-<step>` in `output_dir`, by step, of any file type."""
    try:
        names = os.listdir(output_dir)
    except FileNotFoundError:
        return []
    return sorted((Path(output_dir, name) for name in names if checkpoint_step(name) >= 0), key=checkpoint_step)


def newest_checkpoint(output_dir: PathLike) -> Path:
    """Return the newest checkpoint in `output_dir` that is not damaged; a warning names each newer one that is.

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
    """Return whether gptcore wrote this folder, so that it may be deleted."""
    return _not_ours(path) is None


def _not_ours(path: Path) -> str | None:
    """Return why a `checkpoint-<step>` must not be deleted, or None. Ours has its manifest from its first moment."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISDIR(mode):
        return f"is a {kind_of(mode)}, not a folder"
    for name in ("manifest.json", "trainer_state.json"):
        if not os.path.isfile(path / name) or os.path.islink(path / name):
            return f"has no {name}, so it is not a checkpoint of gptcore"
    return None


def check_unobstructed(output_dir: PathLike, step: int) -> None:
    """Raise FileExistsError if a `checkpoint-<later than step>` is there that training must not replace."""
    for path in _named(output_dir):
        if checkpoint_step(path) > step and (reason := _not_ours(path)):
            raise FileExistsError(f"{path} {reason}; it is never replaced: move it away or choose another output_dir")


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a kill at any moment leaves it complete or absent. Raises FileExistsError if not ours."""
    if reason := _not_ours(path):
        raise FileExistsError(f"{path} {reason}; it is not deleted: move it away or choose another output_dir")
    aside, descriptor = temporary_name(path), None
    with contextlib.suppress(OSError):  # a file system without locks
        descriptor = lock(path)  # so that another process does not sweep it meanwhile
    try:
        os.rename(path, aside)
        remove(aside)
    finally:
        if descriptor is not None:
            unlock(descriptor)


def rotate_checkpoints(output_dir: PathLike, limit: int, newest: int, best: int | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never those of the steps `newest` and `best`.

    So with limit=1 two stay if the best is not the newest. Checkpoints of later steps (left by a run that was resumed
    from an earlier one, because they were damaged) neither count nor go: training replaces them when it gets there. Nor
    do links and folders that gptcore did not write. One that cannot be deleted stays, with a warning.
    """
    ours = [path for path in list_checkpoints(output_dir) if is_ours(path) and checkpoint_step(path) <= newest]
    excess = max(0, len(ours) - limit)
    for path in [path for path in ours if checkpoint_step(path) not in (newest, best)][:excess]:
        try:
            remove_checkpoint(path)
        except OSError as error:
            warnings.warn(f"{path} is beyond save_total_limit, but cannot be deleted: {error}", stacklevel=2)


# ---- one checkpoint --------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: PathLike,
    model: nn.Module,
    optimizer: AdamW,
    state: dict[str, Any],
    tokenizer: Any = None,
    shards: Shards | None = None,
) -> None:
    """Write a checkpoint folder, complete or not at all; a checkpoint of gptcore that has the name is replaced.

    Tensors have the model's own names, or those that its `stored_as` states; `state` is JSON. Those of a sharded model
    are gathered one by one, by `shards`. Raises CheckpointError if it cannot be written, as on a full disk; every other
    checkpoint is then as it was.
    """
    path = Path(path)
    moments = {
        f"{key}.{own_name(name)}": tensor
        for name, parameter in model.named_parameters()  # a tied parameter has one name here
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    try:
        if os.path.lexists(path):
            remove_checkpoint(path)
        with atomic_directory(path) as aside:
            save_weights(model, aside, shards)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            fetch = None if shards is None else lambda name: shards.whole(*reversed(name.split(".", 1)))
            save_tensors(aside / "optimizer.safetensors", moments, fetch=fetch)
            write_json(aside / "random_state.json", random_state())
            write_json(aside / "trainer_state.json", {"format": FORMAT, **state})
            files = sorted(file for file in aside.rglob("*") if file.is_file())
            write_json(aside / "manifest.json", {str(file.relative_to(aside)): _fingerprint(file) for file in files})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} could not be written: {error}. {_advice(error, path.parent)}") from error


def _advice(error: Exception, folder: Path) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in _NO_ROOM:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            return (
                f"{free:,} bytes are free there. The checkpoints before it are untouched: make room and resume from "
                "the newest of them"
            )
    if code in _NOT_ALLOWED:
        return (
            f"Make {folder} writable for this user, or choose another output_dir, and resume from the newest checkpoint"
        )
    return "The checkpoints before it are untouched"


def save_weights(model: nn.Module, folder: Path, shards: Shards | None = None) -> None:
    """Write model.safetensors, adapters included, and, where the model has a config, config.json."""
    if hasattr(model, "stored_as") and shards is None and not hasattr(model, "adapters"):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    layout, tensors = layout_of(model), named_tensors(model)
    own = {stored: name for name, (stored, _) in layout.items()}

    def turned(name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if layout[name][1] else tensor

    fetch = None if shards is None else lambda stored: turned(own[stored], shards.whole(own[stored]))
    save_tensors(
        folder / "model.safetensors", {stored: turned(name, tensors[name]) for stored, name in own.items()}, fetch=fetch
    )
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        task = model.task_config() if hasattr(model, "task_config") else {}  # type: ignore[operator]
        write_json(folder / "config.json", {**config.to_dict(), **task})


def verify_checkpoint(path: PathLike) -> None:
    """Raise CheckpointError, naming the file and the numbers, unless every file holds the bytes that were written."""
    path = Path(path)
    if not path.is_dir():
        reason = "is a link to what does not exist" if path.is_symlink() else "is not a folder"
        raise CheckpointError(
            f"{path} {reason}" if os.path.lexists(path) else f"there is no checkpoint folder {absolute(path)}"
        )
    try:
        manifest = read_json(path / "manifest.json")
        for name in sorted(_NEEDED | manifest.keys()):
            where = f"{path / 'manifest.json'}, {name!r}"
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"{where}: expected the name of a file in this folder")
            expected = entry(manifest, name, dict, path / "manifest.json")
            size, digest = entry(expected, "bytes", int, where), entry(expected, "sha256", str, where)
            found = _fingerprint(path / name, size)
            if found != {"bytes": size, "sha256": digest}:
                raise ValueError(f"{name} should have {expected}, but has {found}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_state(path: PathLike) -> dict[str, Any]:
    """Return the `state` that a verified checkpoint was saved with. Raises CheckpointError for another format."""
    file = Path(path) / "trainer_state.json"
    try:
        state = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if (found := state.pop("format", None)) != FORMAT:
        raise CheckpointError(f"{file} is of format {found!r}, but this version of gptcore reads {FORMAT}")
    if wrong := [key for key, value in state.items() if not isinstance(value, dict)]:
        raise CheckpointError(f"{file} is damaged: {wrong[0]!r} should be a JSON object, not {state[wrong[0]]!r:.60}")
    return state


def load_into(path: PathLike, model: nn.Module, optimizer: AdamW, shards: Shards | None = None) -> None:
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
            if shards is not None:
                for own, (stored, transposed) in layout.items():
                    value = weights.read(stored)
                    shards.fill(own, None, value.t().contiguous() if transposed else value)
                for name in states:
                    key, own = name.split(".", 1)
                    shards.fill(own, key, moments.read(name))
                return
            for file, tensors in ((weights, targets), (moments, states)):
                for name, tensor in tensors.items():
                    file.copy_to(name, tensor)
    except (OSError, ValueError, CheckpointError) as error:
        optimizer.state.clear()
        if isinstance(error, CheckpointError):
            raise
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


def _fingerprint(path: Path, expected: int | None = None) -> dict[str, int | str]:
    """Return bytes and SHA-256 of a file; only its bytes if they are not as expected."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if expected is not None and size != expected:
            return {"bytes": size}
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
