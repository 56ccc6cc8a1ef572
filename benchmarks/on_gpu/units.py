"""Rates of instructions, and golden values of them for the simulator's tests: the kernels of units.cu.

They are compiled for sm_90a by nvcc, or taken from a cubin that was compiled before, and loaded through the driver.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("units.cu")
CUBIN = SOURCE.with_suffix(".cubin")
KERNELS = (
    "empty", "rate_mma", "rate_ldmatrix", "rate_ex2", "rate_wgmma", "golden_ldmatrix", "golden_mma", "golden_wgmma",
    "golden_tma", "golden_mbarrier",
)  # fmt: skip
Row = dict[str, Any]

# Descriptors of wgmma without the address: leading and stride offset in units of 16 bytes, and the swizzle. The rows of
# K-major tiles are 128, 64, 32 or 16 bytes, and eight of them make a pattern.
LAYOUTS = {"128B": (1, 64, 1), "64B": (1, 32, 2), "32B": (1, 16, 3), "none": (64, 8, 0)}
TMA_SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}  # of a tensor map: the reverse order
MBARRIER = [  # an act of golden_mbarrier and its number
    (0, 2), (4, 0), (4, 1), (1, 0), (4, 0), (1, 0), (4, 0), (4, 1), (2, 64), (4, 1), (1, 0), (4, 1), (3, 0), (4, 0),
    (5, 0),
]  # fmt: skip


def descriptor(layout: str) -> int:
    leading, stride, swizzle = LAYOUTS[layout]
    return leading << 16 | stride << 32 | swizzle << 62


def compiled() -> bytes:
    """Return the cubin beside the source if it is newer, or compile it. Raises RuntimeError without nvcc."""
    if not CUBIN.exists() or CUBIN.stat().st_mtime < SOURCE.stat().st_mtime:
        if (nvcc := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")) is None:
            raise RuntimeError(f"no nvcc in PATH, and no {CUBIN.name} compiled before")
        command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90a", "-cubin", str(SOURCE), "-o", str(CUBIN)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or re.search("C75(10|11|14|15)", done.stdout + done.stderr):  # wgmma that ptxas serialises
            CUBIN.unlink(missing_ok=True)
            raise RuntimeError(f"nvcc: {(done.stdout + done.stderr).strip()[:400]}")
    return CUBIN.read_bytes()


class Driver:
    """The kernels of the cubin, launched in PyTorch's context."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context current
        self.library = ctypes.CDLL("libcuda.so.1")
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), compiled())
        self.functions = {}
        for name in KERNELS:
            self.functions[name] = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(self.functions[name]), module, name.encode())

    def call(self, name: str, *args: Any) -> None:
        if code := getattr(self.library, name)(*args):
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def launch(self, name: str, blocks: int, threads: int, shared: int, *args: Any) -> None:
        """Launch on PyTorch's stream; arguments are tensors and ctypes values."""
        values = [ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else arg for arg in args]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", self.functions[name], blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None)

    def tensor_map(self, tensor: Tensor, box: tuple[int, int], swizzle: str) -> Any:
        """Return a CUtensorMap of a dense bfloat16 matrix, in memory aligned to 64 bytes."""
        rows, columns = tensor.shape
        memory = (ctypes.c_uint64 * 32)()
        start = (-ctypes.addressof(memory)) % 64
        encoded = (ctypes.c_uint64 * 16).from_buffer(memory, start)
        bfloat16, zeros, promotion = 9, 0, 0
        self.call(
            "cuTensorMapEncodeTiled", ctypes.byref(encoded), bfloat16, 2, ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2), (ctypes.c_uint32 * 2)(*box[::-1]),
            (ctypes.c_uint32 * 2)(1, 1), 0, TMA_SWIZZLES[swizzle], promotion, zeros,
        )  # fmt: skip
        return encoded


def whole_numbers(count: int, seed: int) -> Tensor:
    """Return bfloat16 numbers from -8 to 8, whose products and their sums are exact."""
    return torch.randint(-8, 9, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def rates(driver: Driver, milliseconds: Callable[..., float]) -> Iterator[Row]:
    yield {"unit": "empty kernel", "ms": milliseconds(lambda: driver.launch("empty", 1, 32, 0))}
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    count, cycles, out = 4096, torch.zeros(1024, dtype=torch.int64, device="cuda"), torch.zeros(1 << 20, device="cuda")
    for name, amount, unit in (
        ("rate_mma", 4096, "FLOP"), ("rate_ldmatrix", 512, "bytes"), ("rate_ex2", 32, "results"),
        ("rate_wgmma", 2 * 64 * 64 * 16 // 4, "FLOP"),
    ):  # fmt: skip
        for warps in (4, 8, 16):
            before = (ctypes.c_uint64(descriptor("128B")),) if name == "rate_wgmma" else ()
            args = ctypes.c_int(count), *before, cycles, out

            def run(name: str = name, warps: int = warps, args: Any = args) -> None:
                driver.launch(name, multiprocessors, 32 * warps, 16384, *args)

            time = milliseconds(run)
            clocks = float(cycles[:multiprocessors].double().median())
            yield {
                "unit": name.removeprefix("rate_"), "warps": warps, "ms": time,
                f"{unit} per clock and multiprocessor": amount * count * warps / clocks,
            }  # fmt: skip


def golden(driver: Driver) -> Iterator[Row]:
    """Yield inputs and results of single instructions, as lists of 32-bit words."""

    def words(tensor: Tensor) -> list[int]:
        return [value & 0xFFFFFFFF for value in tensor.contiguous().cpu().view(torch.int32).flatten().tolist()]

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.to("cuda")

    numbers = torch.arange(256, dtype=torch.int16).view(torch.int32)
    offsets = torch.tensor([16 * ((lane * 5 + 3) % 32) for lane in range(32)], dtype=torch.int32)
    for transposed in (0, 1):
        out = torch.zeros(128, dtype=torch.int32, device="cuda")
        driver.launch(
            "golden_ldmatrix", 1, 32, 512, on_device(numbers), on_device(offsets), ctypes.c_int(transposed), out
        )
        yield {
            "of": "ldmatrix", "transposed": transposed, "in": words(numbers), "offsets": offsets.tolist(),
            "out": words(out),
        }  # fmt: skip
    given = whole_numbers(32 * 12, 1)
    out = torch.zeros(128, device="cuda")
    driver.launch("golden_mma", 1, 32, 0, on_device(given), out)
    yield {"of": "mma m16n8k16", "in": words(given), "out": words(out)}
    for layout in LAYOUTS:
        for transposed in (0, 1) if layout == "128B" else (0,):
            given = whole_numbers(8192, 2)
            a = descriptor(layout)
            out = torch.zeros(128 * 32, device="cuda")
            driver.launch(
                "golden_wgmma", 1, 128, 16384, on_device(given), ctypes.c_uint64(a), ctypes.c_uint64(a),
                ctypes.c_int(transposed), out,
            )  # fmt: skip
            yield {
                "of": "wgmma m64n64k16", "descriptor": a, "layout": layout, "b_transposed": transposed,
                "in": words(given), "out": words(out),
            }  # fmt: skip
    matrix = on_device(torch.arange(24 * 72, dtype=torch.int16).view(torch.bfloat16).view(24, 72))
    for swizzle, columns in (("none", 8), ("32B", 16), ("64B", 32), ("128B", 64)):
        for x, y in ((0, 0), (16, 4), (64, 20), (-8, -2)):
            size = 8 * columns * 2
            out = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
            encoded = driver.tensor_map(matrix, (8, columns), swizzle)
            driver.launch("golden_tma", 1, 32, size, encoded, ctypes.c_int(x), ctypes.c_int(y), ctypes.c_int(size), out)
            yield {
                "of": "cp.async.bulk.tensor.2d", "swizzle": swizzle, "box": [8, columns], "at": [x, y],
                "shape": [24, 72], "out": words(out),
            }  # fmt: skip
    steps = torch.tensor(MBARRIER, dtype=torch.int32)
    states = torch.zeros(len(MBARRIER), 2, dtype=torch.int64, device="cuda")
    driver.launch("golden_mbarrier", 1, 1, 0, on_device(steps), ctypes.c_int(len(MBARRIER)), states)
    yield {"of": "mbarrier", "steps": MBARRIER, "out": states.tolist()}
    torch.cuda.synchronize()
