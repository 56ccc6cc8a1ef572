"""Files that are either complete or absent, and readers whose errors name the file and the key.

Writers fill a hidden folder beside the target, flush the result to the disk and rename it into place. They never
replace anything but a regular file. The hidden folder is locked while its writer lives, so that `sweep` deletes exactly
what killed processes left. Readers open regular files only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import struct
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

PathLike = str | os.PathLike[str]
Made = TypeVar("Made")

JSON_LIMIT = 1 << 28  # bytes; the largest tokenizer.json in use has about 2 ** 25
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_KINDS = {
    stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device", stat.S_IFBLK: "block device", stat.S_IFREG: "regular file",
}  # fmt: skip


def cache_folder(cache_dir: PathLike | None = None) -> Path:
    """Return `cache_dir`, else $GPTCORE_CACHE, else $XDG_CACHE_HOME/gptcore, else ~/.cache/gptcore.

    Raises OSError if the home folder is needed and unknown.
    """
    if folder := cache_dir or os.environ.get("GPTCORE_CACHE"):
        return absolute(folder)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else absolute("~/.cache")) / "gptcore"  # the standard ignores relative ones


def absolute(path: PathLike) -> Path:
    """Return the path with ~ expanded, independent of later changes of the working directory.

    Raises OSError if ~ is needed and the home folder is unknown.
    """
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError:
        raise FileNotFoundError(
            f"{path} needs a home folder, but HOME is not set and the user {os.getuid()} has no entry in the password "
            "database; set HOME, or GPTCORE_CACHE to a folder for caches"
        ) from None


def kind_of(mode: int) -> str:
    """Return the name of a file's type, as "FIFO", from its st_mode."""
    return _KINDS.get(stat.S_IFMT(mode), "special file")


# ---- locks -----------------------------------------------------------------------------------------------------------

_held: set[int] = set()  # descriptors whose locks belong to this process


def _release_inherited() -> None:
    """Close a forked child's copies of locked descriptors: a lock lasts until every copy is closed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_inherited)


def lock(path: PathLike) -> int | None:
    """Open and lock a file or folder; returns the descriptor for `unlock`, or None if another process holds the lock.

    The kernel releases the lock when the process dies, whether or not forked children are alive. Raises OSError where
    the path cannot be opened or the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        unlock(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def unlock(descriptor: int) -> None:
    """Release a lock; does nothing in a forked child, which never holds it."""
    if descriptor in _held:
        _held.remove(descriptor)
        with contextlib.suppress(OSError):  # explicitly, because a child that is being forked still has a copy
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def holds(path: PathLike) -> bool:
    """Return whether this process holds the lock of a file or folder."""
    return any(os.path.samestat(os.stat(path), os.fstat(descriptor)) for descriptor in list(_held))


# ---- writing ---------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flush one file, or the entries of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a new hidden name beside `path` that `sweep` recognises."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def sweep(folder: PathLike) -> None:
    """Delete the temporary files and folders in `folder` whose writer was killed. What cannot be deleted stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):  # another user's, or a file system without locks
                path = Path(folder, name)
                if (descriptor := lock(path)) is not None:
                    try:
                        remove(path)
                    finally:
                        unlock(descriptor)


def make_folder(path: PathLike) -> Path:
    """Make a folder, with those above it, if absent; returns it. Raises NotADirectoryError where something else is."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next(p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir())
        raise NotADirectoryError(errno.ENOTDIR, f"{_described(blocking)}, not a folder", str(blocking)) from error
    return path


def _described(path: PathLike) -> str:
    mode = os.lstat(path).st_mode
    return f"symbolic link to {os.readlink(path)}, which does not exist" if stat.S_ISLNK(mode) else kind_of(mode)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name in a new, locked folder beside `path`; the folder is deleted afterwards, with what is in it."""
    make_folder(path.parent)
    sweep(path.parent)
    try:
        folder, descriptor = _locked_folder(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the temporary name would only confuse
    try:
        yield folder / path.name
    finally:
        remove(folder)
        if descriptor is not None:
            unlock(descriptor)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """Make a temporary folder beside `path` and lock it. Another process may sweep it in between: then try again."""
    while True:
        folder = temporary_name(path)
        folder.mkdir()
        try:
            descriptor = lock(folder)
        except FileNotFoundError:
            continue
        except OSError:  # a file system without locks: nothing is swept there either
            return folder, None
        if descriptor is not None:
            if folder.exists():
                return folder, descriptor
            unlock(descriptor)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all in it, if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_replaceable(path: PathLike) -> None:
    """Raise FileExistsError unless `path` is a regular file or does not exist: writers replace nothing else."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise FileExistsError(
                f"{path} is a {kind_of(mode)} and is not replaced; give the name of a regular file or a new one"
            )


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yield an empty file on the disk of `path` to write to; it replaces `path` when the block ends without an error.

    A kill at any moment leaves the old file or the new one, never a part of either. Raises FileExistsError if `path` is
    anything but a regular file.
    """
    path = Path(path)
    check_replaceable(path)
    with _temporary(path) as aside:
        aside.touch()
        try:
            yield aside
        except OSError as error:
            if error.filename or not error.errno:
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error  # a write names no file
        sync(aside)
        check_replaceable(path)
        os.replace(aside, path)
        sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: PathLike) -> Iterator[Path]:
    """Yield an empty folder on the disk of `path`; it becomes `path` when the block ends without an error.

    Raises FileExistsError if `path` exists: a folder cannot be exchanged in one step.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already; remove it or write somewhere else")
    with _temporary(path) as aside:
        aside.mkdir()
        yield aside
        for entry in sorted(aside.rglob("*")):
            sync(entry)
        sync(aside)
        os.rename(aside, path)
        sync(path.parent)


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as JSON, complete or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"  # before the file is touched: it may raise
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_file(path: PathLike) -> BinaryIO:
    """Open a regular file for reading in binary.

    Raises FileNotFoundError, which says so where `path` is a dangling link; other OSErrors, such as PermissionError;
    ValueError if `path` is a folder, a FIFO or a device, or holds a NUL.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise FileNotFoundError(errno.ENOENT, _described(path), os.fspath(path)) from error
        raise
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not the name of a file: {error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{path} is a {kind_of(mode)}, expected a regular file")
    return open(descriptor, "rb")


@contextlib.contextmanager
def naming(path: PathLike, what: str = "is damaged") -> Iterator[None]:
    """Turn each error that damaged content of a file causes inside into a ValueError with the name of the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError,
            EOFError, MemoryError, struct.error) as error:  # fmt: skip
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = f"there is no {error}" if isinstance(error, KeyError) else f"{error}" or type(error).__name__
        shown = reason if reason.isprintable() else repr(reason)[1:-1]  # an escape code would reach the terminal
        raise ValueError(f"{path} {what}: {shown}") from error


def read_json(path: PathLike) -> dict[str, Any]:
    """Return the JSON object in a file. Raises OSError, or ValueError, naming the file, for anything else."""
    with open_file(path) as file, naming(path):
        if (size := os.fstat(file.fileno()).st_size) > JSON_LIMIT:
            raise ValueError(f"{path} has {size:,} bytes, expected JSON of at most {JSON_LIMIT:,}")
        return parse_json(file.read(size), path)


def read_cache(name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the cache folder; an empty one if it is absent or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return read_json(cache_folder() / name)
    return {}


def write_cache(name: str, values: Mapping[str, Any]) -> None:
    """Replace a file of the cache folder, where that can be written."""
    with contextlib.suppress(OSError):
        write_json(cache_folder() / name, values)


def parse_json(text: str | bytes, where: PathLike) -> dict[str, Any]:
    """Return the JSON object in `text`. Raises ValueError, naming `where`, for anything else."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def entry(values: Mapping[str, Any], key: str, kind: Any, where: PathLike) -> Any:
    """Return values[key], checked against the annotation `kind`, as int, list[str] or float | None.

    Raises ValueError, naming `where` and the key, if it is missing or of another type.
    """
    if key not in values:
        raise ValueError(f"{where} has no {key!r}")
    if not _is_a(values[key], kind):
        shown = repr(values[key])
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise ValueError(f"{where}: {key!r} should be of type {getattr(kind, '__name__', kind)}, not {shown}")
    with naming(where):
        return float(values[key]) if kind is float else values[key]


def from_json(cls: type[Made], values: Any, where: PathLike) -> Made:
    """Return the dataclass `cls` from a JSON object; nested dataclasses are made from nested objects.

    Raises ValueError, naming `where` and the key, for a key that is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {cls.__name__} should be a JSON object, not {values!r:.60}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"{where} has {unknown[0]!r}, which is not known; expected {', '.join(hints)}")
    made: dict[str, Any] = {}
    for key, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            made[key] = from_json(typing.cast(type, kind), entry(values, key, dict, where), f"{where}, {key}")
        else:
            made[key] = entry(values, key, kind, where)
    return cls(**made)


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether a JSON value fits an annotation; an int fits float, a bool fits neither."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, parts[1]) for item in value.values())
    if kind is Any:
        return True
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)
