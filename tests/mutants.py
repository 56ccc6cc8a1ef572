"""Takes one barrier, wait, commit, check, mask or swizzle at a time away from the CUDA kernels: the model must notice.

    python -m tests.mutants                       all of them, in about an hour; writes tests/data/mutants.md
    python -m tests.mutants --sample 8 --seed 1   eight of them, at random

A mutant is compiled like the module gptcore._simt that it replaces, and runs a small grid of calls in a process of its
own. It is caught if the model reports it, if a result differs, if it needs more of what the model counts, or if it
never ends. One that survives is a bug of the model, or a line that the kernel does not need, and is an error, unless
HARMLESS says why that line is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests/data/mutants.md"
SOURCES = {  # the kernels' files, and what is compiled of each
    "tile.cuh": ("attention_forward", "attention_backward"),
    "attention_forward.cuh": ("attention_forward",),
    "attention_backward.cuh": ("attention_backward",),
    "rows.cuh": ("layer_norm", "gelu"),
    "layer_norm.cuh": ("layer_norm",),
    "gelu.cuh": ("gelu",),
}
SECONDS = 120  # for the grid of one mutant, which takes a few

# (file, line, change) as in the table: what the line is good for, though nothing that is counted depends on it.
HARMLESS: dict[tuple[str, str, str], str] = {
    ("rows.cuh", "if (n >= kChunk) return;", "n >= kChunk -> false"): "a shortcut",
    (
        "layer_norm.cuh",
        "GPTCORE_DEVICE int left(int64_t n) { return n < kChunk ? int(n) : kChunk; }",
        "n < kChunk -> true",
    ): "n may be more than an int holds",
    (
        "gelu.cuh",
        "static GPTCORE_DEVICE int clamp(int64_t n) { return n > kChunk ? kChunk : n < 0 ? 0 : int(n); }",
        "n > kChunk -> false",
    ): "n may be more than an int holds",
    (
        "layer_norm.cuh",
        "return {mean, rest, rsqrt_of((variance > 0.0f ? variance : 0.0f) + eps)};",
        "variance > 0.0f -> true",
    ): "rounding may make the variance of equal numbers negative, which matters only where eps is smaller still",
}


def families(file: str) -> list[str]:
    """The parts of GRID that use this file."""
    return [family for family in GRID if any(source.startswith(family) for source in SOURCES[file])]


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    kind: str
    code: str  # of the line, before
    change: str
    text: str  # of the whole file, after

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.code, self.change

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.code}  {self.change}"


CALLS = [
    ("barrier", re.compile(r"\b(warp_)?barrier\(\);")),
    ("wait", re.compile(r"\bcopy_wait<\d+>\(\);")),
    ("commit", re.compile(r"\bcopy_commit\(\);")),
]
SWIZZLE = re.compile(r"\bindex \^ swizzle\b")
COMPARISON = re.compile(r" (<|<=|>|>=|==|!=) ")
ENDS = re.compile(r"&&|\|\||[?:;,{}]| [-+*|&^]?= |\breturn\b")
CONSTANT = re.compile(r"^(k[A-Z]\w*|sizeof|T|int|float|at|true|false)$")


def operand(code: str, middle: int) -> tuple[int, int]:
    """Begin and end of the comparison around an operator: up to the next parenthesis or operator that binds less."""
    begin, depth = 0, 0
    for i in range(middle - 1, -1, -1):
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(code[i], 0)
        if depth < 0 or (depth == 0 and ENDS.match(code, i)):
            found = ENDS.match(code, i) if depth == 0 else None
            begin = found.end() if found else i + 1
            break
    end, depth = len(code), 0
    for i in range(middle + 1, len(code)):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(code[i], 0)
        if depth < 0 or (depth == 0 and ENDS.match(code, i)):
            end = i
            break
    while code[begin] in " !":
        begin += 1
    return begin, end


def mutants_of(file: str) -> Iterator[Mutant]:
    lines = (ROOT / "kernels/cuda" / file).read_text().split("\n")
    for at, line in enumerate(lines):
        code = line.split("//")[0]

        def mutant(kind: str, begin: int, end: int, replacement: str, at: int = at, line: str = line) -> Mutant:
            after = line[:begin] + replacement + line[end:]
            change = f"{line[begin:end].strip()} -> {replacement.strip()}"
            text = "\n".join([*lines[:at], after, *lines[at + 1 :]])
            return Mutant(file, at + 1, kind, line.split("//")[0].strip(), change, text)

        for kind, pattern in CALLS:
            for call in pattern.finditer(code):
                if not code.strip().startswith("GPTCORE_DEVICE"):
                    yield mutant(kind, *call.span(), ";")
        for swizzle in SWIZZLE.finditer(code):
            yield mutant("swizzle", *swizzle.span(), "index")
        if re.search(r"\bconstexpr\b|static_assert|^#|^template", code.strip()):
            continue
        for comparison in COMPARISON.finditer(code):
            begin, end = operand(code, comparison.start())
            if all(CONSTANT.match(name) for name in re.findall(r"[A-Za-z_]\w*", code[begin:end])):
                continue  # known to the compiler
            before, after = code[:begin].rstrip(" !("), code[end:].lstrip(" )")
            is_loop = re.search(r"\bfor \([^;]*;[^;]*$", code[:begin]) is not None
            leaves = re.match(r"(return|continue)\b", after) is not None
            if after.startswith("&&") or before.endswith("&&"):
                values = ["true"]
            elif after.startswith("||") or before.endswith("||") or leaves:
                values = ["false"]
            elif after.startswith("?"):
                values = ["true", "false"]
            elif is_loop:
                continue  # its end, not a check
            else:
                values = ["true"]
            for value in values:
                yield mutant("check", begin, end, value + " " * (code[end - 1] == " "))


# ---- the small grid --------------------------------------------------------------------------------------------------


Call = Callable[[], list[torch.Tensor]]


def attention(dtype: torch.dtype, shape: tuple[int, ...], tf32: bool = False, **options: Any) -> Call:
    batch, query_heads, kv_heads, query_len, kv_len, head_dim = shape

    def call() -> list[torch.Tensor]:
        from gptcore import ops

        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.manual_seed(0)
        sizes = ((query_heads, query_len), (kv_heads, kv_len), (kv_heads, kv_len))
        q, k, v = (torch.randn(batch, *size, head_dim).to(dtype).requires_grad_() for size in sizes)
        out, lse = ops.attention(q, k, v, return_lse=True, backend="simt", **options)
        grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), (q, k, v))
        return [out, lse, *grads]

    return call


def decode(dtype: torch.dtype, kv_len: int, head_dim: int) -> Call:
    def call() -> list[torch.Tensor]:
        from gptcore import ops

        torch.manual_seed(0)
        q = torch.randn(1, 4, 1, head_dim).to(dtype)
        k, v = (torch.randn(1, 2, kv_len, head_dim).to(dtype) for _ in range(2))
        return [ops.attention(q, k, v, backend="simt")]

    return call


def layer_norm(dtype: torch.dtype, rows: int, width: int, bias: bool, residual: torch.dtype | None = None) -> Call:
    def call() -> list[torch.Tensor]:
        from gptcore import ops

        torch.manual_seed(0)
        mean = 1e6 if dtype == F32 else 3.0  # one that matters, also to the backward, which corrects for a wrong one
        x = (torch.randn(rows, width) + mean).to(dtype).requires_grad_()
        parameters = [torch.randn(width, requires_grad=True) for _ in range(1 + bias)]
        added = [torch.randn(rows, width).to(residual).requires_grad_()] if residual else []
        out = ops.layer_norm(x, *parameters, residual=added[0] if added else None, backend="simt")
        outs = list(out) if isinstance(out, tuple) else [out]
        loss = sum(((o.float() * torch.arange(1, width + 1)).sin().sum() for o in outs), torch.zeros(()))
        return [*outs, *torch.autograd.grad(loss, [x, *parameters, *added])]

    return call


def gelu(dtype: torch.dtype, rows: int, width: int, bias: bool, approximate: str) -> Call:
    def call() -> list[torch.Tensor]:
        from gptcore import ops

        torch.manual_seed(0)
        x = (torch.randn(rows, width) * 4).to(dtype)
        large = torch.finfo(dtype).max
        x[0, :6] = torch.tensor([-large, large, -torch.inf, torch.inf, 0.0, -1e-6], dtype=torch.float64).to(dtype)
        x.requires_grad_()
        given = [torch.randn(width, requires_grad=True)] if bias else []
        out = ops.gelu(x, bias=given[0] if given else None, approximate=approximate, backend="simt")
        return [out, *torch.autograd.grad(out.float().sin().sum(), [x, *given])]

    return call


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PACKED = torch.tensor([0, 40, 40, 41, 150])
GRID = {
    "attention": [
        attention(BF16, (1, 2, 1, 150, 150, 64)),
        attention(BF16, (2, 2, 1, 70, 130, 72), causal=False),
        attention(BF16, (1, 1, 1, 130, 70, 61), window=(40, 0)),
        attention(F16, (1, 2, 1, 150, 150, 32), cu_seqlens=PACKED, dropout_p=0.25),
        attention(F16, (1, 1, 1, 80, 80, 33), causal=False, window=(9, 20), scale=-0.2),
        attention(F32, (1, 2, 1, 70, 75, 40)),
        attention(F32, (1, 2, 1, 70, 75, 40), tf32=True, dropout_p=0.25),
        decode(BF16, 1100, 64),
        decode(BF16, 1100, 45),
    ],
    "layer_norm": [
        layer_norm(BF16, 9, 1000, True),
        layer_norm(BF16, 70, 96, True, BF16),
        layer_norm(F16, 5, 1001, False),
        layer_norm(BF16, 6, 768, True, F32),
        layer_norm(F32, 3, 8200, True),
        layer_norm(BF16, 3, 40004, True, BF16),
        layer_norm(F32, 2, 40001, False, F32),
    ],
    "gelu": [
        gelu(BF16, 70, 264, True, "tanh"),
        gelu(F16, 300, 261, True, "none"),
        gelu(F32, 3, 700, False, "tanh"),
        gelu(F32, 3, 701, False, "none"),
        gelu(BF16, 33000, 8, True, "none"),  # blocks of 129 rows in the backward
    ],
}


def run_grid(module: Path, family: str) -> Any:
    """What the calls of a family give in this module: tensors and counters, or the words of the first report."""
    spec = importlib.util.spec_from_file_location("gptcore._simt", module)
    assert spec is not None
    assert spec.loader is not None
    simt = importlib.util.module_from_spec(spec)
    sys.modules["gptcore._simt"] = simt
    spec.loader.exec_module(simt)
    simt.configure(threads=1, count=True)
    tensors = []
    for call in GRID[family]:
        try:
            tensors += [t.detach() for t in call()]
        except RuntimeError as error:
            return str(error)
    counts: dict[str, int] = {}
    for kernel in simt.counters().values():
        for name, count in kernel.items():
            counts[name] = counts.get(name, 0) + count
    return tensors, counts


def in_a_process(module: Path, family: str) -> Any:
    """run_grid in a fork of this process, which has never used a kernel."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            try:
                import signal

                signal.alarm(SECONDS)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                pickle.dump(run_grid(module, family), file)
                file.flush()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return "never ends" if os.WTERMSIG(status) == 14 else f"crashes with signal {os.WTERMSIG(status)}"
        file.seek(0)
        return pickle.load(file) if status == 0 else "raises another error"


def verdict(got: Any, expected: Any) -> str | None:
    """How a mutant was caught, or None."""
    if isinstance(got, str):
        return got.split(" in kernel ")[0] if " in kernel " in got else got[:60]
    for a, b in zip(got[0], expected[0], strict=True):
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(1.5), b[~finite].nan_to_num(1.5)):
            return "wrong result"
        if not ((a - b)[finite].abs() <= 1e-2 * (b[finite].abs() + b[finite].abs().median())).all():  # nor for NaN
            return "wrong result"
    for name, count in sorted(expected[1].items()):  # bank_conflicts first
        if got[1][name] > count * 1.001:
            return f"more {name}"
    return None


# ---- compiling -------------------------------------------------------------------------------------------------------


class Build:
    """The objects of gptcore._simt as CMake left them, and how it made them."""

    def __init__(self, copies: Path) -> None:
        databases = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda path: path.stat().st_mtime)
        if not databases:
            raise SystemExit("no build/*/compile_commands.json: build the package first, with pip install -e .")
        self.folder = databases[-1].parent
        for name in ("kernels", "csrc"):  # as they are now
            shutil.copytree(ROOT / name, copies / name)
        self.commands: dict[str, list[str]] = {}
        self.objects: list[Path] = []
        for entry in json.loads(databases[-1].read_text()):
            command = [word.replace(str(ROOT / "csrc"), str(copies / "csrc")) for word in shlex.split(entry["command"])]
            command = [f"-I{copies}" if word == f"-I{ROOT}" else word for word in command]
            output = command[command.index("-o") + 1]
            if "simt" in output:
                self.objects.append(Path(shutil.copy(self.folder / output, copies)))
                if output.endswith(".cu.o"):
                    self.commands[Path(entry["file"]).stem] = command

    def link(self, replaced: dict[str, Path], to: Path) -> None:
        objects = [replaced.get(path.name, path) for path in self.objects]
        subprocess.run(["g++", "-shared", "-fopenmp", "-o", to, *objects, "-ldl"], check=True)

    def mutant(self, mutant: Mutant, folder: Path) -> Path | None:
        """The module with this mutant, or None if it does not compile."""
        header = folder / "kernels/cuda" / mutant.file
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(mutant.text)
        replaced = {}
        for name in SOURCES[mutant.file]:
            command = list(self.commands[name])
            command[command.index("-o") + 1] = str(folder / f"{name}.o")
            command[1:1] = [f"-I{folder}"]  # before the repository
            command += ["-O1", "-w"]
            result = subprocess.run(command, cwd=self.folder, stderr=subprocess.PIPE, text=True)
            if result.returncode:
                return None
            replaced[f"{name}.cu.o"] = folder / f"{name}.o"
        module = folder / "_simt.so"
        self.link(replaced, module)
        return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", choices=SOURCES, help="only of this file")
    parser.add_argument("--kind", help="only barrier, wait, commit, check or swizzle")
    parser.add_argument("--sample", type=int, help="so many at random; writes no table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="compile nothing")
    args = parser.parse_args()

    mutants = [
        m for file in SOURCES if args.file in (None, file) for m in mutants_of(file) if args.kind in (None, m.kind)
    ]
    if args.sample:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    if args.list:
        for m in mutants:
            print(m)
        print(len(mutants), "mutants")
        return 0

    torch.set_num_threads(1)
    rows, survivors = [], 0
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder))
        original = Path(folder) / "_simt.so"
        build.link({}, original)
        needed = dict.fromkeys(family for mutant in mutants for family in families(mutant.file))
        expected = {family: in_a_process(original, family) for family in needed}
        for family, result in expected.items():
            if isinstance(result, str):
                raise SystemExit(f"{family} fails without a mutation: {result}")
        for i, mutant in enumerate(mutants, 1):
            with tempfile.TemporaryDirectory() as work:
                module = build.mutant(mutant, Path(work))
                caught: str | None = None if module else "does not compile"
                for family in families(mutant.file) if module else ():
                    caught = caught or verdict(in_a_process(module or original, family), expected[family])
            harmless = HARMLESS.get(mutant.key)
            survivors += caught in (None, "does not compile") and harmless is None
            result = caught or (f"survives: {harmless}" if harmless else "SURVIVES")
            rows.append((mutant, result))
            print(f"{i}/{len(mutants)} {mutant}: {result}", flush=True)
    if not args.sample and not args.file and not args.kind:
        TABLE.write_text(table(rows))
    print(f"{len(rows)} mutants, {survivors} survived without a reason")
    return 1 if survivors else 0


def table(rows: list[tuple[Mutant, str]]) -> str:
    lines = [
        "# Mutants of the CUDA kernels",
        "",
        "Made by `python -m tests.mutants`. Each row is one line of a kernel, changed, and how it was caught: the rule",
        "that the model reported, or what the small grid found wrong, or what the model counted more of.",
        "",
        "| file | line | change | verdict |",
        "|---|---|---|---|",
    ]
    for mutant, result in rows:
        code, change = (text.replace("|", "\\|") for text in (mutant.code, mutant.change))
        lines.append(f"| {mutant.file} | `{code}` | `{change}` | {result} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
