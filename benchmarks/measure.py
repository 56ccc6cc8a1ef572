"""Measurements: limits of the machine, spreads, and rows of results.

A benchmark runs in rounds of the limit, the reference and ours. Ratio and percentage of the limit are computed within a
round of a few hundred milliseconds, so a machine that slows down affects all three alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from gptcore import _C
from gptcore.info import describe

FORM = os.environ.get("GPTCORE_BENCH", "quick")
COMPILE = os.environ.get("GPTCORE_BENCH_COMPILE") == "1"
PYTORCH = "PyTorch, compiled" if COMPILE else "PyTorch"

Run = Callable[[], object]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def pick(toy: T, real: T) -> T:
    """Return `toy` in the toy form, and `real` in the quick and the full form."""
    return toy if FORM == "toy" else real


BLOCK = pick(0.0, 0.02)  # seconds: shorter runs are repeated to take at least this long
WARM = 0.1  # seconds: shorter runs have an untimed warm-up, because the other side evicted their data from the caches
ROUNDS = {"toy": (2, 2), "quick": (3, 15), "full": (7, 60)}[FORM]
BUDGET = {"toy": 0.0, "quick": 1.0, "full": 15.0}[FORM]  # seconds for the rounds beyond the minimum


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reference(function: F) -> F:
    """Return PyTorch's function, compiled with --compile."""
    return torch.compile(function, dynamic=False) if COMPILE else function  # type: ignore[return-value]


# ---- numbers and their spread


class Spread(NamedTuple):
    """A median and the quartiles around it; the extremes where there are fewer than eight values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("cannot compute the spread of an empty sequence")
    if len(values) < 8:
        return Spread(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def verdict(measured: Spread, goal: float) -> str:
    """Return whether a goal is met, and whether the difference is within the spread."""
    word = "met" if measured.median >= goal else "missed"
    return f"{word}, within the spread" if measured.low < goal < measured.high else word


def seconds(run: Run, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


# How a benchmark starts another process: afresh, with PyTorch's imports, unless the times are meaningless anyway
PROCESSES: Any = multiprocessing.get_context(pick("fork", "spawn"))


def in_child(module: str, *arguments: str) -> Any:
    """Run `python -m module` in its own process and return its last line, parsed as JSON."""
    if FORM == "toy":
        ours, theirs = PROCESSES.Pipe()
        PROCESSES.Process(target=_run_module, args=(theirs, module, arguments)).start()
        theirs.close()
        return ours.recv()
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=root, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _run_module(pipe: Connection, module: str, arguments: Sequence[str]) -> None:
    sys.argv, output = [module, *arguments], io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(importlib.import_module(module).__file__, run_name="__main__")  # type: ignore[arg-type]
    pipe.send(json.loads(output.getvalue().splitlines()[-1]))


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory in this process.

    By default it returns tensors above 32 MB and the free end of the heap to the system, and fresh memory costs page
    faults.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_MAX, 0) == libc.mallopt(M_TRIM_THRESHOLD, -1) == 1


# ---- what the machine can do


class Limit:
    """A hardware limit: `run` performs `amount` of `unit`. Keeps the rates that it has measured."""

    def __init__(self, name: str, run: Run, amount: float, unit: str) -> None:
        self.name, self.run, self.amount, self.unit = name, run, amount, unit
        self.rates: list[float] = []

    def rate(self) -> float:
        self.rates.append(self.amount / seconds(self.run))
        return self.rates[-1]


_limits: dict[str, Limit] = {}


def _limit(name: str, make: Callable[[], Limit]) -> Limit:
    if name not in _limits:
        _limits[name] = make()
        _limits[name].run()
    return _limits[name]


def matmul(dtype: torch.dtype) -> Limit:
    """Return the limit of PyTorch's matmul of 2048 x 2048 matrices."""

    def make() -> Limit:
        n = pick(64, 2048)
        a, b, c = (torch.randn(n, n).to(dtype) for _ in range(3))
        return Limit(name, lambda: torch.mm(a, b, out=c), 2 * n**3, "FLOP")

    name = f"matmul {name_of(dtype)}"
    return _limit(name, make)


def has_bfloat16() -> bool:
    """Return whether the instruction set in use multiplies bfloat16."""
    return "bf16" in _C.cpu_isa()


def operand(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which linear layers of `dtype` are multiplied: float32 without instructions for it."""
    return dtype if dtype is torch.bfloat16 and has_bfloat16() else torch.float32


def copy() -> Limit:
    """Return the limit of copying 128 MiB, more than a cache holds; bytes read and written both count."""

    def make() -> Limit:
        a = torch.ones(pick(2**16, 2**25))
        b = torch.empty_like(a).copy_(a)
        return Limit("copy", lambda: b.copy_(a), 2 * a.nbytes, "B")

    return _limit("copy", make)


def read() -> Limit:
    """Return the limit of reading 128 MiB by max, the fastest of PyTorch's reductions."""

    def make() -> Limit:
        a = torch.ones(pick(2**16, 2**25))
        return Limit("read", a.max, a.nbytes, "B")

    return _limit("read", make)


def integer_matmul() -> Limit:
    """Return the limit of PyTorch's product of 8-bit integers."""

    def make() -> Limit:
        n = pick(64, 2048)
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
        return Limit("matmul int8", lambda: torch._int_mm(a, b), 2 * n**3, "FLOP")

    return _limit("matmul int8", make)


class Slower(Limit):
    """The slower of reading `bytes` and computing `flops`: a limit of kernels that do both at once."""

    def __init__(self, arithmetic: Limit, bytes: float, flops: float) -> None:
        self.parts = (read(), bytes), (arithmetic, flops)
        name = f"the slower of {' and '.join(part.name for part, _ in self.parts)}"
        super().__init__(name, lambda: [part.run() for part, _ in self.parts], 1, "call")

    def rate(self) -> float:
        """Return the calls in a second."""
        self.rates.append(min(part.rate() / work for part, work in self.parts))
        return self.rates[-1]


def limits() -> dict[str, dict[str, Any]]:
    """Return the rates of all limits of this run."""
    return {
        name: {"unit": f"{limit.unit}/s", "rate": list(spread(limit.rates)), "rounds": len(limit.rates)}
        for name, limit in _limits.items()
        if limit.rates
    }


# ---- results


def plan(pause: float, pair: float, once: float) -> tuple[int, int]:
    """Return (rounds, calls a round): the limit takes `pause` seconds, both sides `pair`, the faster one `once`."""
    calls = max(1, math.ceil(BLOCK / once))
    fewest, most = ROUNDS
    return min(most, max(fewest, int(BUDGET / (pause + pair * calls)))), calls


def row(
    group: str,
    case: str,
    ours: Sequence[float],
    reference: Sequence[float],
    *,
    against: str,
    unit: str = "s",
    limit: Limit | None = None,
    rates: Sequence[float] = (),
    flops: float = 0,
    bytes: float = 0,
    calls: int = 1,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a row of results.json from the values of each round: seconds per call, or bytes.

    ratio is reference / ours: above 1, ours is better. percent is of the limit, or None without a limit.
    """
    percent = None
    if limit is not None:
        work = {"FLOP": flops, "B": bytes}.get(limit.unit, limit.amount)
        if not work:
            raise ValueError(
                f"{group} {case}: a limit in {limit.unit}/s needs the amount of work in {limit.unit}, but it is 0"
            )
        percent = list(spread([100 * work / rate / value for rate, value in zip(rates, ours, strict=True)]))
    return {
        "group": f"toy {group}" if FORM == "toy" else group,  # matches no goal
        "case": case,
        "unit": unit,
        "against": against,
        "ours": list(spread(ours)),
        "reference": list(spread(reference)),
        "ratio": list(spread([r / o for r, o in zip(reference, ours, strict=True)])),
        "rounds": len(ours),
        "calls": calls,
        "limit": limit.name if limit is not None else None,
        "percent": percent,
        "flops": flops,
        "bytes": bytes,
        "extra": extra or {},
    }


def environment() -> dict[str, Any]:
    """Return where and when the results were measured."""
    versions = {"python": platform.python_version()}
    for name in ("gptcore", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "form": FORM + (", against torch.compile" if COMPILE else ""),
        "versions": versions,
        "cpu": describe()["cpu"]
        + f" limited to {_C.cpu_isa().upper()} instructions" * (_C.cpu_isa() != _C.supported_isas()[-1]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: other work on the machine, if called at the start
    }
