"""Builds gptcore._C and gptcore._simt with CMake. Everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake, which writes the modules where setuptools expects them: in the wheel, or here for pip install -e."""

    def build_extensions(self) -> None:  # one run builds both
        target = Path(self.get_ext_fullpath("gptcore._C")).resolve().parent
        # Kept between builds, so that the second one is fast; one folder for each version of Python.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # may name tools of a deleted environment
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
    # Some compilers cannot build the GPU simulator; the package works without it.
    ext_modules=[Extension("gptcore._C", sources=[]), Extension("gptcore._simt", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
