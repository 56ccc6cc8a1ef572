"""Builds gptcore._C and gptcore._simt by running CMake. All else that a package needs to say is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """CMake writes the module straight to where setuptools wants it: the wheel, or this folder for `pip install -e`."""

    def build_extensions(self) -> None:  # one run builds both
        target = Path(self.get_ext_fullpath("gptcore._C")).resolve().parent
        # A folder that lasts makes the second build quick; its name keeps different Pythons apart.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # it may name the tools of a build environment that is gone
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGPTCORE_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(
    # Some compilers cannot build the model of a GPU; the package works without it.
    ext_modules=[Extension("gptcore._C", sources=[]), Extension("gptcore._simt", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
