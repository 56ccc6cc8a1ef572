"""python -m benchmarks.gpu: measures the kernels, a training step and generation on a GPU, and tests the kernels.

Builds gptcore's CUDA kernels if this installation has none for the GPU, without a network. Then it runs parts in the
order of their value, each in a process of its own and for a limited time: rates of the machine, GPT-2's training step
against others', attention, layer norm and GELU against PyTorch's, layer norm with a warm and a cold cache, what a
matrix product could be joined with, generation, rates of single instructions, and golden values of them for the
simulator. At last it runs the kernel grid of tests/grid.py on the backends cuda and triton, a few runs in CUDA
graphs, and a few calls under compute-sanitizer where it is installed.

gpu.json is complete after each part, however this ends. --dry-run runs every part here, on the CPU. Times of kernels
are medians of CUDA events. Exits with 2 without a GPU, and with 1 if a step failed; failures are also in gpu.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.on_gpu import steps, units
from benchmarks.on_gpu.checks import build, grid, run, sanitize, small
from benchmarks.on_gpu.processes import Stopped, in_child, part_file, stop, use_module, write_json

__all__ = ["run"]  # for tests

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


# ---- times -----------------------------------------------------------------------------------------------------------


FLUSHES = ("dirty", "clean", "warm")  # what the L2 cache holds: lines of zeros, lines that were read, the call's own


def milliseconds(call: Run, rounds: int = 31, flush: str = "dirty") -> float:
    """Return the median GPU time of a call, with the L2 cache flushed unless it is warm; on a CPU the time of one."""
    if DEVICE == "cpu":
        return steps.wall(call, DEVICE, 1)
    for _ in range(3):
        call()
    other = torch.zeros(64 << 20, dtype=torch.int32, device=DEVICE)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        if flush == "dirty":
            other.zero_()
        elif flush == "clean":
            other.sum()
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


# ---- parts -----------------------------------------------------------------------------------------------------------


def warm_and_cold(dry: bool) -> Iterator[dict[str, Any]]:
    """Yield times of layer norm with a cache full of dirty or clean lines of other data, and with its own data."""
    from gptcore import ops

    backends = [name for name in ("cuda", "triton", "cpu" if dry else "torch") if ops.backends()[name] is None]
    for case, (rows, width) in ROWS.items():
        x, weight, bias = (
            torch.randn(*shape, device=DEVICE, dtype=BF16) for shape in ((rows, width), (width,), (width,))
        )
        calls = {
            f"gptcore {name}": functools.partial(ops.layer_norm, x, weight, bias, backend=name) for name in backends
        }
        calls["PyTorch"] = functools.partial(F.layer_norm, x, (width,), weight, bias)
        for name, call in calls.items():
            yield {"case": case, "name": name} | {flush: milliseconds(call, flush=flush) for flush in FLUSHES}


def epilogues(dry: bool) -> Iterator[dict[str, Any]]:
    """Yield times of what could be joined with a matrix product, and of the product that would do it.

    The epilogue of cuBLASLt keeps no input of GELU: a backward pass would compute the product again.
    """
    from gptcore import ops

    rows, width = (64, 32) if dry else ROWS["GPT-2 124M"]
    shapes = {"x": (rows, width), "weight": (4 * width, width), "bias": (4 * width,), "grad": (rows, 4 * width)}
    x, weight, bias, grad = (torch.randn(*shape, device=DEVICE, dtype=BF16) for shape in shapes.values())
    ones = torch.ones(1, rows, device=DEVICE, dtype=BF16)
    calls: dict[str, Run] = {
        "product": lambda: F.linear(x, weight, bias),
        "product, then GELU": lambda: ops.gelu(F.linear(x, weight, bias)),
        "product with GELU": lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True),
        "gradient of a bias by a sum": lambda: grad.sum(0),
        "gradient of a bias by a product": lambda: ones @ grad,
    }
    for name, call in calls.items():
        yield {"name": name, "shapes": shapes, "milliseconds": milliseconds(call)}


def measured_rates(dry: bool) -> Iterator[dict[str, Any]]:
    for megabytes in (0.1,) if dry else (12.6, 25.0, 100.0, 600.0):
        a = torch.empty(int(megabytes * 1e6), dtype=torch.uint8, device=DEVICE)
        b = torch.empty_like(a)
        yield {"copy_mb": megabytes} | {flush: milliseconds(lambda: b.copy_(a), flush=flush) for flush in FLUSHES}  # noqa: B023
    for n in (64,) if dry else (4096, 8192):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=BF16) for _ in range(2))
        yield {"matmul": n, "flops": 2 * n**3 / milliseconds(lambda: a @ b, rounds=11) * 1e3}  # noqa: B023


def kernels(dry: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of compare() for every case."""
    from gptcore import ops

    reasons = ops.backends()
    backends = ["cpu"] if dry else [name for name in ("cuda", "triton") if reasons[name] is None]
    rates = {"copy": 1e9, "matmul": 1e9} if dry else {"copy": copy_rate(), "matmul": matmul_rate()}
    yield {"rates": rates}
    for case in cases():
        yield from compare(case, backends, rates)


def unit_rates(dry: bool) -> Iterator[dict[str, Any]]:
    if dry:
        yield {"compiled": len(units.compiled())}
    else:
        yield from units.rates(units.Driver(), milliseconds)


def golden_values(dry: bool) -> Iterator[dict[str, Any]]:
    if dry:
        yield {"compiled": len(units.compiled())}
    else:
        yield from units.golden(units.Driver())


def described(dry: bool) -> Iterator[dict[str, Any]]:
    """Yield what runs here: the machine, its clocks, and which backends are usable."""
    from gptcore import ops

    yield {"backends": ops.backends(), "python": sys.version}
    if not dry:
        done = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK"], capture_output=True, text=True)
        yield {"nvidia-smi": done.stdout}


class Part(NamedTuple):
    """A part of the measurement: the most seconds that it gets, and what yields its rows."""

    seconds: float
    rows: Callable[[bool], Iterator[dict[str, Any]]]


# In the order of their value, for when the time ends
PARTS = {
    "machine": Part(60, described),
    "rates": Part(40, measured_rates),
    "step": Part(180, lambda dry: steps.steps(DEVICE, dry)),
    "kernels": Part(150, kernels),
    "layer norm": Part(40, warm_and_cold),
    "epilogues": Part(20, epilogues),
    "generation": Part(60, lambda dry: steps.generation(DEVICE, dry)),
    # In a process of their own: a capture that fails leaves CUDA unusable
    "graphs": Part(90, lambda dry: steps.steps(DEVICE, dry, graphs=True)),
    "units": Part(40, unit_rates),
    "golden": Part(30, golden_values),
}


def run_part(name: str, output: Path, dry: bool) -> int:
    """Run a part in this process; its rows are in the file after each."""
    results: dict[str, Any] = {"rows": []}
    for row in PARTS[name].rows(dry):
        results["rows"].append(row)
        write_json(part_file(output, name), results)
        print(f"   {json.dumps(row)[:150]}", flush=True)
        if row.get("failure"):
            print(f"FAILED {name}: {row.get('name')}: {row['failure']}", flush=True)
    return 0


def measure(output: Path, names: list[str], seconds: float, options: list[str], dry: bool, skip_tests: bool) -> int:
    """Run the parts; gpu.json is complete after each of them."""
    end = time.monotonic() + seconds
    output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": "dry run" if dry else torch.cuda.get_device_name(),
        "capability": [] if dry else list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rates": {},
        "rows": [],
        "parts": {},
        "failures": failures,
    }
    write_json(output / "gpu.json", results)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name in names:
            left = end - time.monotonic()
            if left < 1:
                failures.append(f"{name}: no time is left")
                continue
            part = in_child(name, output, min(left, PARTS[name].seconds), options)
            results["parts"][name] = part
            if name == "kernels":
                results["rates"] = part["rows"][0]["rates"] if part["rows"] else {}
                results["rows"] = part["rows"][1:]
            if part["failure"]:
                failures.append(f"{name}: {part['failure']}")
            failures += [
                f"{name}: {row.get('case', '')} {row.get('name', '')}: {row['failure']}"
                for row in part["rows"]
                if row.get("failure") and str(row.get("name")).startswith("gptcore")
            ]
            write_json(output / "gpu.json", results)
            if part["stopped"]:
                return 1
        if not dry and not skip_tests:
            from gptcore import ops

            backends = [name for name in ("cuda", "triton") if ops.backends()[name] is None]
            failures += [problem] if backends and (problem := grid(backends)) else []
            failures += sanitize() if "cuda" in backends else []
    except Stopped:
        failures.append("stopped")
    finally:
        write_json(output / "gpu.json", results)
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        if results["rows"]:
            draw(results, output / "gpu.png")
    except ImportError:
        print("== no gpu.png: matplotlib is not installed; pip install matplotlib")
    print(f"== {output / 'gpu.json'}", *(f"FAILED {failure}" for failure in failures), sep="\n")
    return 1 if failures else 0


def use_tiny_sizes() -> None:
    """Run every part on the CPU, to find out whether it runs."""
    global DEVICE, ATTENTION, ROWS
    DEVICE, ATTENTION, ROWS = "cpu", {"tiny": (1, 2, 8, 16)}, {"tiny": (4, 8)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=7200, help="for everything; default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--module", type=Path, metavar="FILE", help="a native module built before, instead of ours")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to find out whether it runs")
    parser.add_argument("--skip-tests", action="store_true", help="times only")
    parser.add_argument("--small", action="store_true", help="a few small calls and nothing else, for sanitizers")
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.dry_run:
        print("python -m benchmarks.gpu: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    if args.module is not None:
        use_module(args.module)
    if args.dry_run:
        use_tiny_sizes()
    if args.small:
        small()
        return 0
    if args.part is not None:
        return run_part(args.part, args.output.resolve(), args.dry_run)
    if not args.dry_run and args.module is None and (failure := build()):
        print(f"FAILED {failure}")
        return 1
    options = [*(["--dry-run"] if args.dry_run else []), *(["--module", str(args.module)] if args.module else [])]
    return measure(args.output.resolve(), args.parts, args.seconds, options, args.dry_run, args.skip_tests)


if __name__ == "__main__":
    sys.exit(main())
