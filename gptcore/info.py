"""Describes this installation and the hardware that it can use, for `gptcore info`."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import torch

from gptcore import _C, ops, precision
from gptcore.ops.linear import describe_choice
from gptcore.ops.quantized_linear import describe_kernels


def openmp_runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes in this process. More than one slows down every parallel kernel."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    return sorted(set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)\S*\.so\S*", maps.read_text())))


def cpu_name() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def describe() -> dict[str, str]:
    """Return the lines of `gptcore info` by heading, in order."""
    build = _C.build_info()
    runtimes = openmp_runtimes()
    openmp = ", ".join(runtimes) or "none found"
    if len(runtimes) > 1:
        openmp += "\nwarning: several OpenMP runtimes in a process oversubscribe the cores; keep one, or LD_PRELOAD it"
    supported = _C.supported_isas()
    isas = ", ".join(f"{isa}{'' if isa in supported else ' (not on this CPU)'}" for isa in _C.compiled_isas())
    chosen = _C.cpu_isa() + (" (GPTCORE_CPU_ISA)" if os.environ.get("GPTCORE_CPU_ISA") else "")
    ratios = [f"{precision.name(dtype)} {precision.slowdown(dtype):.2g}" for dtype in (torch.bfloat16, torch.float16)]
    lines = {
        "gptcore": f"{build['version']} in {Path(__file__).parent}",
        "python": f"{sys.version.split()[0]} in {sys.executable}",
        "torch": torch.__version__,
        "compiler": str(build["compiler"]),
        "cpu": cpu_name(),
        "instruction sets": isas,
        "in use": chosen,
        "16 bits on the CPU": f"{', '.join(ratios)} times as long as float32 (a training step of a block, measured)",
        "linear layers on the CPU": describe_choice(),
        "quantized layers": describe_kernels(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} (torch.set_num_threads)",
        "openmp": openmp,
        "cuda": _C.cuda_problem() or f"built for {', '.join(_C.cuda_archs())}",
    }
    for name, reason in ops.backends().items():
        lines[f"backend {name}"] = "usable" if reason is None else f"not usable: {reason}"
    return lines
