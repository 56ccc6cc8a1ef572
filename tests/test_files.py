"""Files on disk: complete or absent, swept after kills, never written over a device, and read with named errors."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gptcore import files
from gptcore.files import (
    absolute,
    atomic_directory,
    atomic_file,
    cache_folder,
    entry,
    from_json,
    lock,
    make_folder,
    naming,
    open_file,
    parse_json,
    read_json,
    sweep,
    unlock,
    write_json,
)


def in_child(action: Callable[[], Any]) -> int:
    """Run `action` in a forked child; returns its exit status, minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- paths


def test_cache_folder_needs_no_home_where_one_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GPTCORE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: unknown(self) if str(self).startswith("~") else self)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match=r"HOME is not set.*no entry in the password database.*GPTCORE_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gptcore"
    monkeypatch.setenv("GPTCORE_CACHE", "relative")
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / "relative"


def test_tilde_and_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/x") == tmp_path / "x"
    assert cache_folder("~/x") == tmp_path / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("GPTCORE_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "gptcore"
    monkeypatch.chdir(tmp_path)
    assert absolute("y") == tmp_path / "y"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match=r"regular file, not a folder.*/file'"):
        make_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"regular file, not a folder.*/file'"):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(NotADirectoryError, match=r"symbolic link to nowhere, which does not exist, not a folder"):
        write_json(tmp_path / "dangling" / "x.json", {})


# ---- locks


@pytest.mark.parametrize("killed", [False, True])
def test_a_living_child_does_not_keep_the_lock(tmp_path: Path, killed: bool) -> None:
    """The holder exits or is killed; its child stays alive, as a DataLoader's persistent worker may."""
    alive, ready = os.pipe(), os.pipe()

    def hold_and_fork() -> None:
        descriptor = lock(tmp_path)
        assert descriptor is not None
        assert lock(tmp_path) is None, "a second lock"
        if os.fork() == 0:
            os.close(alive[1])
            unlock(descriptor)  # as on leaving a block; it must not close a descriptor that is another's by now
            os.write(ready[1], b"x")
            os.read(alive[0], 1)
            os._exit(0)
        if killed:
            os.read(ready[0], 1)
            kill_self()
        unlock(descriptor)
        again = lock(tmp_path)
        assert again is not None, "the forked child keeps the lock"

    assert in_child(hold_and_fork) == (-signal.SIGKILL if killed else 0)
    descriptor = lock(tmp_path)
    os.close(alive[1])
    assert descriptor is not None, "the forked child keeps the lock"
    unlock(descriptor)


# ---- writing


def children(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path, make: Any) -> None:
    def die() -> None:
        with make(tmp_path / "first") as aside:
            (aside.parent / ".tmpLIBRARY").touch()
            kill_self()

    assert in_child(die) == -signal.SIGKILL
    assert len(children(tmp_path)) == 1
    write_json(tmp_path / "second", {})
    assert children(tmp_path) == ["second"]


def test_sweep_spares_living_writers_and_what_is_not_ours(tmp_path: Path) -> None:
    spared = [".mine.tmp", ".x.0123456789ab.tmp.keep", "x.0123456789ab.tmp", ".x.0123456789AB.tmp"]
    for name in spared:
        (tmp_path / name).touch()
    (tmp_path / ".link.0123456789ab.tmp").symlink_to(tmp_path)
    with atomic_file(tmp_path / "file"), atomic_directory(tmp_path / "folder"):
        before = children(tmp_path)
        assert in_child(lambda: sweep(tmp_path)) == 0
        sweep(tmp_path)
        assert children(tmp_path) == before
    assert children(tmp_path) == sorted([*spared, ".link.0123456789ab.tmp", "file", "folder"])


@pytest.fixture(params=["folder", "FIFO", "socket", "symbolic link", "character device"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """Something that is not a regular file, and what it is called."""
    path, kind = tmp_path / "special", request.param
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "symbolic link":
        (tmp_path / "target").write_text("kept")
        path.symlink_to(tmp_path / "target")
    else:
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    return path, kind


def test_nothing_but_a_regular_file_is_replaced(special: tuple[Path, str]) -> None:
    path, kind = special
    before = os.lstat(path)
    with pytest.raises(FileExistsError, match=rf"special is a {kind} and is not replaced"), atomic_file(path):
        pytest.fail("the block was entered")
    with pytest.raises(FileExistsError, match="special exists already"), atomic_directory(path):
        pytest.fail("the block was entered")
    assert os.lstat(path) == before
    path.rename(path.with_name("moved"))
    with pytest.raises(FileExistsError, match=kind), atomic_file(path):
        path.with_name("moved").rename(path)  # it appears while the file is written
    assert os.lstat(path).st_ino == before.st_ino


def test_errors_of_writing_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/file'"),
        atomic_file(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    long = tmp_path / ("x" * 250)
    with pytest.raises(OSError, match=rf"File name too long: '{long}'"), atomic_file(long):
        pass


# ---- reading


def test_only_regular_files_are_opened(special: tuple[Path, str]) -> None:
    path, kind = special
    if kind == "symbolic link":
        assert open_file(path).read() == b"kept"
    elif kind == "socket":
        with pytest.raises(OSError, match="special"):
            open_file(path)
    else:
        with pytest.raises(ValueError, match=f"special is a {kind}, expected a regular file"):
            read_json(path)


def test_files_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"symbolic link to nowhere, which does not exist: '.*/dangling'"):
        read_json(tmp_path / "dangling")
    with pytest.raises(ValueError, match=r"'a\\x00b' is not the name of a file"):
        open_file("a\0b")


def test_what_another_user_may_not_touch_is_told_apart_from_what_is_absent(tmp_path: Path) -> None:
    """In a child that is not root; by relative names, because it may not enter the folders above."""
    (tmp_path / "unreadable").write_text("{}")
    (tmp_path / "unreadable").chmod(0)
    (tmp_path / ".x.0123456789ab.tmp").mkdir(mode=0o700)
    tmp_path.chmod(0o555)

    def look() -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        with pytest.raises(PermissionError, match="unreadable"):
            read_json("unreadable")
        with pytest.raises(PermissionError, match=r"'new\.json'"):
            write_json("new.json", {})
        sweep(".")

    assert in_child(look) == 0
    tmp_path.chmod(0o755)
    assert children(tmp_path) == [".x.0123456789ab.tmp", "unreadable"]


JSON_DAMAGE = [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"[]", b"null", b"\0" * 10, b"1" * 5000]


@pytest.mark.parametrize("content", JSON_DAMAGE, ids=range(len(JSON_DAMAGE)))
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="that string"):
        parse_json(content, "that string")


def test_huge_json_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"x\.json has 1,099,511,627,776 bytes, expected JSON of at most"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda: {}["key"],
        lambda: [][0],
        lambda: None.x,  # type: ignore[attr-defined]
        lambda: len(3),  # type: ignore[arg-type]
        lambda: int("x"),
        lambda: b"\xff".decode(),
        lambda: float(10**400),
        lambda: json.loads("[" * 100_000),
        lambda: 1 // 0,
        lambda: (_ for _ in ()).throw(RuntimeError),
    ],
)
def test_every_error_of_damaged_content_names_the_file(damage: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"^the/file is damaged: \S.*"), naming("the/file"):
        damage()


def test_errors_that_are_not_damage_pass() -> None:
    with pytest.raises(KeyboardInterrupt), naming("the/file"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"^the/file has no x$"), naming("the/file"):
        raise ValueError("the/file has no x")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3, 10**30], [True, 1.0, "1", None, []]),
        (float, [1, 1.5], [True, "1", None, 10**400]),
        (str, ["", "x"], [1, None]),
        (bool, [True], [1, None]),
        (int | None, [None, 3], [1.5, True]),
        (list[int], [[], [1, 2]], [[True], ["1"], {}, None]),
        (dict[str, float], [{}, {"a": 1}], [{"a": None}, []]),
    ],
)
def test_entries_are_checked_by_type(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert entry({"key": value}, "key", kind, "x.json") == value
    for value in bad:
        with pytest.raises(ValueError, match=r"x\.json.*"):
            entry({"key": value}, "key", kind, "x.json")
    with pytest.raises(ValueError, match=r"x\.json has no 'key'"):
        entry({}, "key", kind, "x.json")


@dataclass
class Inner:
    loss: float = 0.0


@dataclass
class Outer:
    step: int = 0
    inner: Inner = field(default_factory=Inner)
    best: float | None = None


def test_dataclasses_are_made_from_json() -> None:
    values: dict[str, Any] = {"step": 3, "inner": {"loss": 1}, "best": None}
    assert from_json(Outer, values, "x.json") == Outer(3, Inner(1.0), None)
    for damaged in (None, [], {**values, "step": "3"}, {**values, "inner": 3}, {**values, "inner": {"loss": None}},
                    {**values, "more": 1}, {"step": 3}):  # fmt: skip
        with pytest.raises(ValueError, match=r"x\.json.*(step|inner|loss|more|Outer)"):
            from_json(Outer, damaged, "x.json")


def test_importing_files_does_not_import_torch() -> None:
    program = "import sys, importlib.util as u; s = u.spec_from_file_location('files', sys.argv[1])\n"
    program += "m = u.module_from_spec(s); sys.modules['files'] = m; s.loader.exec_module(m)\n"
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, files.__file__], check=True)


def test_an_error_that_quotes_a_file_has_no_control_characters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file is damaged: version \\x1b\[31m") as caught, naming(tmp_path / "file"):
        raise ValueError("version \x1b[31m")
    assert str(caught.value).isprintable()
