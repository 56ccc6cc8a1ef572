"""Folders that `gptcore prepare` has made: token shards of each split, and their tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcore.files import PathLike, entry, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Prepared:
    """The files of a prepared folder."""

    folder: Path
    tokenizer: Path
    train: list[Path]
    validation: list[Path]
    test: list[Path]


def find_prepared(paths: Sequence[PathLike]) -> Prepared | None:
    """Return the prepared folder that `paths` names, or None if they are text files.

    Raises ValueError for a folder beside other paths, or for a folder without a manifest.
    """
    folders = [path for path in paths if os.path.isdir(path)]
    if not folders:
        return None
    folder = Path(folders[0])
    if len(paths) > 1:
        raise ValueError(f"{folder} is a folder: give one prepared folder, or text files")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is a folder without {MANIFEST}: give text files, or make it by `gptcore prepare`")
    where = folder / MANIFEST
    splits = entry(read_json(where), "splits", dict[str, list[str]], where)
    files = {
        name: [folder / Path(file).name for file in splits.get(name, [])] for name in ("train", "validation", "test")
    }
    if not files["train"]:
        raise ValueError(f"{where} names no shards for training")
    return Prepared(folder, folder / "tokenizer", **files)
