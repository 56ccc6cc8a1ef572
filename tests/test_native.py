"""gptcore._C as a binary: its stubs, symbols and libraries, threads, the GIL and fork."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gptcore import _C
from gptcore.ops.attention import Settings

ROOT = Path(__file__).resolve().parent.parent


def shell(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- type stubs ------------------------------------------------------------------------------------------------------

# How pybind11 names the types of arguments and results
PYBIND_TYPES = {
    "torch.Tensor": "Tensor",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt | typing.SupportsIndex": "int",
    'typing.Annotated[collections.abc.Sequence[int], "FixedSize(4)"]': "Sequence[int]",
}


def stubs_of(module: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Return the declarations of a stub file by name; imported ones as the other file declares them."""
    found: dict[str, ast.FunctionDef | ast.ClassDef] = {}
    for node in ast.parse((ROOT / "gptcore" / f"{module}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("gptcore."):
            there = stubs_of(str(node.module).removeprefix("gptcore."))
            found |= {alias.name: there[alias.name] for alias in node.names}
    return found


@pytest.mark.parametrize("module", ["_C", "_simt"])
def test_the_stubs_say_what_the_module_has(module: str) -> None:
    built, stubs = importlib.import_module(f"gptcore.{module}"), stubs_of(module)
    assert sorted(stubs) == sorted(name for name in dir(built) if not name.startswith("__"))
    for name, stub in stubs.items():
        if isinstance(stub, ast.ClassDef):
            assert [base.__name__ for base in getattr(built, name).__bases__] == [ast.unparse(b) for b in stub.bases]
            continue
        signature = getattr(built, name).__doc__.splitlines()[0]
        for pybind, plain in PYBIND_TYPES.items():
            signature = signature.replace(pybind, plain)
        real = ast.parse(f"def {signature}: ...").body[0]
        assert isinstance(real, ast.FunctionDef)
        assert ast.unparse(stub.args) == ast.unparse(real.args), name
        assert stub.returns is not None
        assert real.returns is not None
        assert ast.unparse(stub.returns).startswith(ast.unparse(real.returns)), name  # ours says what a list holds
        assert ast.get_docstring(stub), f"{name} has no docstring"


# ---- symbols and libraries -------------------------------------------------------------------------------------------


def objects(target: str) -> list[Path]:
    """The object files of a CMake target, in the folder that was built last."""
    folders = [p for p in ROOT.glob(f"build/*/CMakeFiles/{target}.dir") if p.parts[-3] != "sanitize"]
    assert folders, "no build folder: `pip install -e .` makes one"
    found = sorted(max(folders, key=lambda p: p.stat().st_mtime).rglob("*.o"))
    assert found
    return found


@pytest.mark.parametrize("isa", _C.compiled_isas())
def test_kernels_share_no_symbol_that_the_linker_could_merge(isa: str) -> None:
    for path in objects(f"kernels_{isa}"):
        for line in shell("nm", "--demangle", path).splitlines():
            kind, symbol = line[17], line[19:]
            assert kind not in "WVuC", f"{path.name}: weak symbol {symbol}"
            if kind == "T":
                assert symbol.startswith(f"gptcore::{isa}::"), f"{path.name}: {symbol} is outside of its namespace"
            if kind == "U" and not symbol.startswith(f"gptcore::{isa}::"):
                assert "::" not in symbol, f"{path.name} needs {symbol}, code with other flags"


@pytest.mark.skipif("avx2" not in _C.compiled_isas(), reason="other processors have no such registers")
def test_code_that_runs_everywhere_has_no_wide_instructions() -> None:
    wide = re.compile(r"%[yz]mm|\tv[a-z0-9]+ .*%xmm")
    for path in [*objects("kernels_baseline"), *objects("_C")]:
        found = wide.search(shell("objdump", "-d", "--no-show-raw-insn", path))
        assert not found, f"{path.name}: {found.group()}"
    registers = {"avx2": "%ymm", "avx512": "%zmm", "avx512_bf16": "vdpbf16ps", "amx_bf16": "tdpbf16ps"}
    for isa in _C.compiled_isas()[1:]:
        assert any(registers[isa] in shell("objdump", "-d", path) for path in objects(f"kernels_{isa}")), isa


def test_the_module_links_openmp_once_and_no_torch() -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", shell("readelf", "-d", _C.__file__))
    assert [name for name in needed if re.search("omp", name)] == ["libgomp.so.1"]
    assert not [name for name in needed if re.search("torch|c10|cuda|python", name)], needed
    exported = [line.split()[-1] for line in shell("nm", "-D", "--defined-only", _C.__file__).splitlines()]
    assert "PyInit__C" in exported
    assert not [symbol for symbol in exported if "gptcore" in symbol]


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_prints_nothing() -> None:
    done = python("from gptcore import ops")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_one_openmp_runtime_and_only_the_threads_that_torch_allows() -> None:
    done = python("""
import os, re, torch
from gptcore import ops
x = torch.randn(4, 8, 256, 32).requires_grad_()
def run(threads):
    torch.set_num_threads(threads)
    ops.attention(x, x, x).sum().backward()
    ops.gelu(ops.layer_norm(x.flatten(0, 2), torch.ones(32))).sum().backward()
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
# The thread of autograd's engine may come with the first backward pass
x.sum().backward()
engine = len(os.listdir("/proc/self/task"))
print(run(1) - engine, run(3) - engine)
maps = open("/proc/self/maps").read()
print(*{os.path.realpath(path) for path in re.findall(r"\\S*/lib[a-z]*omp\\d?[-.]\\S*", maps)}, sep="\\n")
""")
    assert done.returncode == 0, done.stderr
    threads, *runtimes = done.stdout.splitlines()
    assert threads == "0 2"
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("shape", [(2**16, 2**15, 1, 8), (1, 1, 2**31, 8)], ids=str)
def test_sizes_beyond_32_bits_are_refused(shape: tuple[int, ...]) -> None:
    x, lse = torch.zeros(8).expand(shape), torch.zeros(1).expand(shape[:3])
    with pytest.raises(ValueError, match=r"expected batch x heads, .* at most 2\^31 - 257"):
        _C.attention_forward(x, x, x, x, lse, Settings(scale=0.1, causal=False), 1)


def test_other_python_threads_run_during_a_kernel() -> None:
    x = torch.randn(1, 4, 3000, 64)
    times: list[float] = []

    def work() -> None:
        out, lse = torch.empty_like(x), torch.empty(x.shape[:3])
        times.append(time.monotonic())
        _C.attention_forward(x, x, x, out, lse, Settings(scale=0.1, causal=False), 1)
        times.append(time.monotonic())

    worker = threading.Thread(target=work)
    worker.start()
    ticks = []
    while worker.is_alive():
        ticks.append(time.monotonic())
        time.sleep(1e-4)
    begin, end = times
    # Without the GIL a tick comes every 0.1 ms or so; with it held none at all between begin and end.
    assert sum(begin + 0.1 * (end - begin) < tick < end - 0.1 * (end - begin) for tick in ticks) >= 3


@pytest.mark.slow
def test_the_instruction_set_can_be_forced() -> None:
    for isa in (_C.supported_isas()[0], _C.supported_isas()[-1]):
        done = python("from gptcore import _C; print(_C.cpu_isa())", GPTCORE_CPU_ISA=isa)
        assert done.stdout.strip() == isa
    done = python("from gptcore import _C", GPTCORE_CPU_ISA="sse9")
    assert done.returncode == 1
    known = ", ".join(_C.compiled_isas())
    assert f"ImportError: GPTCORE_CPU_ISA: unknown CPU instruction set 'sse9', expected one of: {known}" in done.stderr
    with pytest.raises(ValueError, match="unknown CPU instruction set 'avx9', expected one of: baseline"):
        _C.use_cpu_isa("avx9")


@pytest.mark.slow
def test_kernels_run_in_a_forked_data_loader() -> None:
    # GNU OpenMP does not survive a fork once it has started threads: the workers, which have one each, must not need it
    done = python("""
import torch
from gptcore import ops
torch.set_num_threads(2)
x = torch.randn(2, 4, 128, 32)
def run(_):
    y = ops.gelu(ops.layer_norm(ops.attention(x, x, x), torch.ones(32)))
    return y.sum()
here = run(0)
loader = torch.utils.data.DataLoader(
    range(4), batch_size=None, num_workers=2, collate_fn=run, multiprocessing_context="fork", timeout=60
)
assert all(torch.equal(there, here) for there in loader)
print("done")
""")
    assert done.stdout == "done\n", done.stderr


def test_what_was_built() -> None:
    kinds = {name: type(value) for name, value in _C.build_info().items()}
    assert kinds.pop("nvcc", str) is str
    assert kinds == {"version": str, "compiler": str, "openmp": int}
    assert bool(_C.cuda_archs()) == ("nvcc" in _C.build_info())
    if not torch.cuda.is_available():
        assert _C.cuda_problem()
