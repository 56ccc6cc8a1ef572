"""The build of the kernels for a GPU, and their tests on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from benchmarks.on_gpu.processes import ROOT


def run(title: str, command: list[str], timeout: float, **environment: str) -> str | None:
    """Run a step with its output on the terminal; return its failure or None."""
    print(f"== {title}: {' '.join(command)}", flush=True)
    try:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=timeout).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{title}: {error}"
    return f"{title}: exit code {code}" if code else None


def build() -> str | None:
    """Build the kernels if the installed module has none for this GPU. Must run before gptcore is imported."""
    major, minor = torch.cuda.get_device_capability()
    probe = f"from gptcore import _C; print('sm_{major}{minor}' in _C.cuda_archs() and not _C.cuda_problem())"
    found = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    if found.stdout.strip() == "True":
        return None
    # Without a network: the build requirements are those of this environment
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
    return run("build", command, 3600, GPTCORE_CUDA="ON")


def grid(backends: list[str]) -> str | None:
    files = [f"tests/test_{name}.py" for name in ("attention", "layer_norm", "gelu", "ops", "graph")]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", " or ".join([*backends, "graphs_of_a_gpu"])]
    return run("kernel grid", command, 7200)


def sanitize() -> list[str]:
    """Run a few small calls under compute-sanitizer if it is installed; return the failures."""
    folders = [os.environ.get("PATH", ""), *(f"{os.environ.get(key, '')}/bin" for key in ("CUDA_HOME", "CUDA_PATH"))]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))
    if tool is None:
        print("== compute-sanitizer is not installed")
        return []
    child = [sys.executable, "-m", "benchmarks.gpu", "--small"]
    return [
        problem
        for kind in ("memcheck", "racecheck")
        if (problem := run(kind, [tool, "--tool", kind, "--error-exitcode", "9", *child], 3600))
    ]


def small() -> None:
    """Run every operation, forward and backward, at sizes small enough for a sanitizer."""
    from gptcore import ops

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (32, 64, 80, 128, 256):
            q, k, v = (torch.randn(1, 2, 70, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in "qkv")
            for queries in (q, q[:, :, :1]):
                ops.attention(queries, k, v, backend="cuda").sum().backward()
        for width in (64, 100, 768, 12296):
            x = torch.randn(33, width, device="cuda", dtype=dtype, requires_grad=True)
            weight = torch.ones(width, device="cuda", requires_grad=True)
            ops.layer_norm(x, weight, weight, backend="cuda").sum().backward()
            for approximate in ("tanh", "none"):
                ops.gelu(x, bias=weight, approximate=approximate, backend="cuda").sum().backward()
    torch.cuda.synchronize()
