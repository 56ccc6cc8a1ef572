"""docs/adding-an-operation.md, carried out in a copy of the tree: the blocks of the page are what is built and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/adding-an-operation.md"
COPIED = ("CMakeLists.txt", "pyproject.toml", "csrc", "kernels", "gptcore", "tests")


def blocks() -> list[tuple[str, str | None, str]]:
    """The path, the first line if it says where, and the text of each block of the page."""
    found = []
    for section in re.split(r"(?m)^### ", PAGE.read_text())[1:]:
        path = section.split("\n", 1)[0]
        for text in re.findall(r"(?ms)^```(?:cpp|python)\n(.*?)^```$", section):
            place, rest = text.split("\n", 1) if text.startswith("@@ ") else (None, text)
            found.append((path, place, rest))
    return found


def insert(file: Path, place: str, text: str) -> None:
    """Add text before or after the only line of the file that contains the words of `place`."""
    side, words = re.fullmatch(r"@@ (after|before) (.*)", place).groups()  # type: ignore[union-attr]
    lines = file.read_text().splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if words in line)
    lines.insert(at + (side == "after"), text)
    file.write_text("".join(lines))


def carry_out(tree: Path) -> set[str]:
    """Apply the page to a tree; returns the files that it touched."""
    touched = set()
    for path, place, text in blocks():
        file = tree / path
        if place is None:
            assert not file.exists(), f"{path} exists"
            file.write_text(text)
        else:
            insert(file, place, text)
        touched.add(path)
    return touched


@pytest.mark.slow
def test_the_page_adds_an_operation_that_works(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    pybind11 = pytest.importorskip("pybind11", reason="pip install pybind11 cmake ninja")
    if cmake is None:
        pytest.skip("pip install pybind11 cmake ninja")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    touched = carry_out(tmp_path)
    new = {path for path in touched if not (ROOT / path).exists()}
    assert len(touched) <= 12
    assert len(new) > len(touched) / 2
    shutil.copytree(tmp_path / "kernels/triton", tmp_path / "gptcore/kernels")  # as pyproject.toml installs it
    configure = [
        cmake, "-S", ".", "-B", "build", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        "-DGPTCORE_CUDA=OFF", "-DGPTCORE_BASELINE_ONLY=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path / 'gptcore'}",
    ]  # fmt: skip
    if ccache := shutil.which("ccache"):
        configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
    tests = ("tests/test_operations.py", "tests/test_native.py::test_the_stubs_say_what_the_module_has[_C]")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    # Objects of the same sources in another folder are found, too
    environment |= {"CCACHE_BASEDIR": str(tmp_path), "CCACHE_NOHASHDIR": "1"}
    for command in (
        configure,
        [cmake, "--build", "build", "--target", "_C", "--parallel", "2"],
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests, "-k", "rms_norm or stubs"],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    # 3 dtypes on each backend, 2 of them compiled, and the stubs
    assert re.search(r"\b1[0-9] passed", done.stdout), done.stdout
