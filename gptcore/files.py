"""Files that are either whole or absent: JSON and tensors written aside, flushed to disk and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

PathLike = str | os.PathLike[str]


def cache_folder(cache_dir: PathLike | None = None) -> Path:
    """Where caches are kept: `cache_dir`, else $GPTCORE_CACHE, else $XDG_CACHE_HOME/gptcore, else ~/.cache/gptcore."""
    if folder := cache_dir or os.environ.get("GPTCORE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptcore"


def sync(path: Path) -> None:
    """Flush one file, or the entries of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    """A new hidden name beside `path`, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; it takes the place of `path` when the block ends without an error.

    A kill at any moment leaves the old file or the new one, never a part of either.
    """
    path = Path(path)
    aside = _aside(path)
    aside.touch()
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it becomes `path`, all at once, when the block ends without an error.

    Raises FileExistsError if `path` exists: a folder cannot be exchanged in one step.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or write somewhere else")
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
        for entry in sorted(aside.rglob("*")):
            sync(entry)
        sync(aside)
        os.rename(aside, path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"  # before the file is touched: it may raise
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def read_json(path: PathLike) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or ValueError for anything that is not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def save_tensors(path: PathLike, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all (OSError). Shared storage is written once for each name."""
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as aside:
        try:
            safetensors.torch.save_file(plain, aside, metadata={"format": "pt", **(metadata or {})})
        except safetensors.SafetensorError as error:  # what a full disk is to it
            raise OSError(f"{path} could not be written: {error}") from error


def load_tensors(path: PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, by name. Raises FileNotFoundError, or ValueError for a damaged file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
