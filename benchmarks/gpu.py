"""python -m benchmarks.gpu: builds and tests the GPU kernels, and times them against PyTorch's.

Builds gptcore's CUDA kernels if this installation has none for the GPU, runs the kernel grid of tests/grid.py on
the backends cuda and triton, runs a few calls under compute-sanitizer where it is installed, and times attention,
layer norm and GELU against PyTorch's own. Writes gpu.json and gpu.png.

Times are medians of CUDA events, with the L2 cache flushed before each call. Exits with 2 without a GPU, and with 1
if a step failed; failures are also recorded in gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
BF16 = torch.bfloat16
Run = Callable[[], object]

# name: batch, heads, length, head_dim
ATTENTION = {
    "GPT-2 124M": (8, 12, 1024, 64),
    "GPT-2 1.5B": (4, 25, 1024, 64),
    "GPT-3 2.7B": (2, 32, 2048, 80),
    "GPT-3 175B": (1, 96, 2048, 128),
}
# name: rows, width of the layer norm; a GELU is four times as wide
ROWS = {"GPT-2 124M": (8192, 768), "GPT-2 1.5B": (4096, 1600), "GPT-3 2.7B": (4096, 2560), "GPT-3 175B": (2048, 12288)}


class Case(NamedTuple):
    """A timed case: `ours` by backend and `theirs` by name, called with the tensors; its work in FLOP or bytes."""

    op: str
    case: str
    tensors: tuple[Tensor, ...]
    grad: Tensor
    ours: Callable[..., Tensor]
    theirs: dict[str, Callable[..., Tensor]]
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


# ---- before the times ------------------------------------------------------------------------------------------------


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
    return run("build", [sys.executable, "-m", "pip", "install", "--no-deps", "-e", "."], 3600, GPTCORE_CUDA="ON")


def grid(backends: list[str]) -> str | None:
    files = [f"tests/test_{name}.py" for name in ("attention", "layer_norm", "gelu", "ops")]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", " or ".join(backends)]
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

    for dtype in (BF16, torch.float16, torch.float32):
        for head_dim in (32, 64, 80, 128, 256):
            q, k, v = (torch.randn(1, 2, 70, head_dim, device=DEVICE, dtype=dtype, requires_grad=True) for _ in "qkv")
            for queries in (q, q[:, :, :1]):
                ops.attention(queries, k, v, backend="cuda").sum().backward()
        for width in (64, 100, 768, 12296):
            x = torch.randn(33, width, device=DEVICE, dtype=dtype, requires_grad=True)
            weight = torch.ones(width, device=DEVICE, requires_grad=True)
            ops.layer_norm(x, weight, weight, backend="cuda").sum().backward()
            for approximate in ("tanh", "none"):
                ops.gelu(x, bias=weight, approximate=approximate, backend="cuda").sum().backward()
    torch.cuda.synchronize()


# ---- times -----------------------------------------------------------------------------------------------------------


def milliseconds(call: Run, rounds: int = 31) -> float:
    """Return the median GPU time of a call, with the L2 cache flushed."""
    for _ in range(3):
        call()
    other = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        other.zero_()
        torch.cuda._sleep(2_000_000)  # about 1 ms, so that the call is enqueued before it starts
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_rate() -> float:
    """Return bytes read and written per second when copying 1 GiB."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) * 1e3


def matmul_rate(dtype: torch.dtype = BF16) -> float:
    """Return FLOP/s of PyTorch's matmul of 8192 x 8192 matrices."""
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, rounds=11) * 1e3


def scaled_dot_product(name: str) -> Callable[..., Tensor]:
    """Return PyTorch's attention with one of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def cases() -> Iterator[Case]:
    from gptcore import ops

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=BF16, requires_grad=grad)

    sdpa = {
        f"SDPA {name}": scaled_dot_product(attribute)
        for name, attribute in (
            ("flash", "FLASH_ATTENTION"),
            ("efficient", "EFFICIENT_ATTENTION"),
            ("cudnn", "CUDNN_ATTENTION"),
            ("math", "MATH"),
        )
    }
    for name, shape in ATTENTION.items():
        batch, heads, length, head_dim = shape
        flops = 4.0 * batch * heads * length**2 * head_dim / 2  # causal: half of the pairs
        q, k, v = (normal(*shape) for _ in "qkv")
        yield Case(
            "attention",
            f"{name} {shape}",
            (q, k, v),
            normal(*shape, grad=False),
            lambda q, k, v, backend: ops.attention(q, k, v, backend=backend),
            sdpa,
            forward_flops=flops,
            backward_flops=2.5 * flops,
        )
    for name, (rows, width) in ROWS.items():
        x, weight, bias = normal(rows, width), normal(width), normal(width)
        size = float(x.nbytes)
        yield Case(
            "layer_norm",
            f"{name} {(rows, width)}",
            (x, weight, bias),
            normal(rows, width, grad=False),
            lambda x, weight, bias, backend: ops.layer_norm(x, weight, bias, backend=backend),
            {"PyTorch": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias)},
            forward_bytes=2 * size,
            backward_bytes=3 * size,
        )
        x = normal(rows, 4 * width)
        size = float(x.nbytes)
        yield Case(
            "gelu",
            f"{name} {(rows, 4 * width)}",
            (x,),
            normal(rows, 4 * width, grad=False),
            lambda x, backend: ops.gelu(x, backend=backend),
            {"PyTorch": lambda x: F.gelu(x, approximate="tanh")},
            forward_bytes=2 * size,
            backward_bytes=3 * size,
        )


def time_of(function: Callable[..., Tensor], case: Case) -> dict[str, float]:
    """Return the milliseconds of the forward and of the backward pass."""
    with torch.no_grad():
        forward = milliseconds(lambda: function(*case.tensors))
    out = function(*case.tensors)
    backward = milliseconds(lambda: torch.autograd.grad(out, case.tensors, case.grad, retain_graph=True))
    return {"forward": forward, "backward": backward}


def compare(case: Case, backends: list[str], rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each pass and contestant; if it fails, with the error message instead of a time."""
    contestants: dict[str, Callable[..., Tensor]] = {
        f"gptcore {backend}": lambda *tensors, backend=backend: case.ours(*tensors, backend=backend)
        for backend in backends
    }
    rows: list[dict[str, Any]] = []
    for name, function in (contestants | case.theirs).items():
        times: dict[str, float] = {}
        failure = None
        try:
            times = time_of(function, case)
        except (RuntimeError, ValueError, AttributeError) as error:  # such as an SDPA backend that this GPU lacks
            failure = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        for stage in ("forward", "backward"):
            time = times.get(stage)
            flops, moved = (getattr(case, f"{stage}_{unit}") for unit in ("flops", "bytes"))
            limit = flops / rates["matmul"] if flops else moved / rates["copy"]
            rows.append(
                {
                    "op": case.op,
                    "case": case.case,
                    "pass": stage,
                    "name": name,
                    "ms": time,
                    "percent": None if time is None else 100 * limit * 1e3 / time,
                    "failure": failure,
                }
            )
    for row in rows:
        theirs = [
            other["ms"] for other in rows
            if other["pass"] == row["pass"] and other["name"] in case.theirs and other["ms"] is not None
        ]  # fmt: skip
        row["ratio"] = min(theirs) / row["ms"] if theirs and row["ms"] else None
    return rows


# ---- output ----------------------------------------------------------------------------------------------------------


def text_of(row: dict[str, Any]) -> str:
    head = f"{row['op']:<11}{row['case']:<31}{row['pass']:<9}{row['name']:<16}"
    if row["ms"] is None:
        return f"{head}{row['failure']}"[:160]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f} x"
    of = "matmul" if row["op"] == "attention" else "copy"
    return f"{head}{row['ms']:9.3f} ms {ratio}  {row['percent']:5.1f} % of {of}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw bars of the percent of the limit, with axes for each operation and pass."""
    from matplotlib.figure import Figure

    panels = sorted({(row["op"], row["pass"]) for row in results["rows"]})
    figure = Figure(figsize=(7 * 2, 3.2 * ((len(panels) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat
    for axis, (op, stage) in zip(axes, panels, strict=False):
        rows = [row for row in results["rows"] if (row["op"], row["pass"]) == (op, stage)]
        names, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "case"))
        for i, name in enumerate(names):
            percent = {row["case"]: row["percent"] or 0 for row in rows if row["name"] == name}
            heights = [percent[label] for label in labels]
            axis.bar([x + i * 0.8 / len(names) for x in range(len(labels))], heights, 0.8 / len(names), label=name)
        axis.set_xticks([x + 0.4 - 0.4 / len(names) for x in range(len(labels))], labels, fontsize=7)
        axis.set_title(f"{op} {stage}: % of measured {'matmul' if op == 'attention' else 'copy'} rate", fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(f"{results['gpu']}, PyTorch {results['torch']}, {results['date']}", fontsize=10)
    figure.savefig(path, dpi=120)


def measure(output: Path, skip_tests: bool) -> int:
    failures = [failure] if (failure := build()) else []
    from gptcore import ops  # only now: the build may have replaced the module

    reasons = ops.backends()
    backends = [name for name in ("cuda", "triton") if reasons.get(name, "unknown") is None]
    for name in ("cuda", "triton"):
        if name not in backends:
            print(f"== backend {name}: {reasons.get(name)}")
    if "cuda" not in backends:
        failures.append(f"backend cuda: {reasons.get('cuda')}")
    if backends and not skip_tests:
        failures += [problem] if (problem := grid(backends)) else []
        failures += sanitize() if "cuda" in backends else []

    rates = {"copy": copy_rate(), "matmul": matmul_rate()}
    print(f"== copy {rates['copy'] / 1e9:.0f} GB/s, bfloat16 matmul {rates['matmul'] / 1e12:.0f} TFLOP/s")
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rates": rates,
        "rows": [],
        "failures": failures,
    }
    output.mkdir(parents=True, exist_ok=True)
    for case in cases():
        rows = compare(case, backends, rates)
        failures += [
            f"{row['op']} {row['case']} {row['pass']} {row['name']}: {row['failure']}"
            for row in rows
            if row["failure"] and row["name"].startswith("gptcore")
        ]
        print(*map(text_of, rows), sep="\n", flush=True)
        results["rows"] += rows
        (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")  # a later case may crash
    try:
        draw(results, output / "gpu.png")
    except ImportError:
        print("== no gpu.png: matplotlib is not installed; pip install matplotlib")
    print(f"== {output / 'gpu.json'}", *(f"FAILED {failure}" for failure in failures), sep="\n")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--skip-tests", action="store_true", help="times only")
    parser.add_argument("--small", action="store_true", help="a few small calls and nothing else, for sanitizers")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    if args.small:
        small()
        return 0
    return measure(args.output, args.skip_tests)


if __name__ == "__main__":
    sys.exit(main())
