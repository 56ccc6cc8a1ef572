"""Remove one barrier, wait, commit, check, mask or swizzle at a time from the CUDA kernels: the simulator must notice.

    python -m tools.mutants                       all of them; writes tools/data/mutants.md
    python -m tools.mutants --sample 8 --seed 1   eight of them, at random

The kernels are compiled once, like the module gptcore._simt that they replace, with every mutation in them behind
is_mutant(i). Then each mutant runs a small grid of calls in a process of its own. It is caught if the simulator reports
it, if a result differs, if a counter of the simulator increases, or if it never ends. A mutant that survives is a bug
of the simulator or an unnecessary line, and an error, unless HARMLESS gives the reason for that line.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.simt_grid import GRID

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tools/data/mutants.md"
SOURCES = {  # the kernels' files, and what is compiled of each
    "tile.cuh": ("attention_forward", "attention_backward"),
    "nonfinite.cuh": ("attention_forward", "attention_backward"),
    "attention_forward.cuh": ("attention_forward", "attention_forward_sm90"),
    "warpgroup.cuh": ("attention_forward_sm90", "attention_backward_sm90"),
    "attention_delta.cuh": ("attention_backward",),
    "attention_backward.cuh": ("attention_backward", "attention_backward_sm90"),
    "rows.cuh": ("layer_norm", "gelu"),
    "layer_norm.cuh": ("layer_norm",),
    "gelu.cuh": ("gelu",),
}
SECONDS = 30  # of a processor, for the grid of one mutant, which takes one or two

# (file, line, change) as in the table: the reason for a line that no result and no counter depends on.
HARMLESS: dict[tuple[str, str, str], str] = {
    ("rows.cuh", "if (n >= kChunk) return;", "n >= kChunk -> false"): "a shortcut",
    (
        "attention_forward.cuh",
        "if (p.group == 1) return rows_of<T>(view, batch, kv_head, index);",
        "p.group == 1 -> false",
    ): "a shortcut",
    (
        "attention_forward.cuh",
        "if (factors[0] * factors[1] != 1.0f) rescale(0, 0, factors[0]), rescale(0, 1, factors[1]);",
        "factors[0] * factors[1] != 1.0f -> true",
    ): "a shortcut",
    (
        "attention_forward.cuh",
        "return p.dropout && !is_kept(p, head, row / p.group, key) ? 0.0f : weight;",
        "p.dropout -> true",
    ): "a shortcut",
    (
        "tile.cuh",
        "for (int i = 0; i < 4; ++i) a[i] = step < kHeld ? fragments[m][step][i] : v.w[i];",
        "step < kHeld -> true",
    ): "fragments of all steps are in registers, which are not counted here",
    (
        "attention_backward.cuh",
        "const float kept = !p.dropout ? 1.0f : is_kept(p, query_head, query, key) ? p.dropout_scale : 0.0f;",
        "!p.dropout -> false",
    ): "a shortcut",
    (
        "attention_backward.cuh",
        "const int rows = row_len - first_row < kRows ? row_len - first_row : kRows;",
        "row_len - first_row < kRows -> true",
    ): "the compiler, which then knows that they are few, needs up to 22 registers less",
    (
        "layer_norm.cuh",
        "return {mean, rest, rsqrt_of((variance > 0.0f ? variance : 0.0f) + eps + (sums[1] - sums[1]))};",
        "variance > 0.0f -> true",
    ): "rounding may make the variance of equal numbers negative, which matters only where eps is smaller still",
    (
        "layer_norm.cuh",
        "GPTCORE_DEVICE int left(int64_t n) { return n < kChunk ? int(n) : kChunk; }",
        "n < kChunk -> true",
    ): "n may be more than an int holds, and 64-bit counts take registers",
    (
        "gelu.cuh",
        "static GPTCORE_DEVICE int clamp(int64_t n) { return n > kChunk ? kChunk : int(n); }",
        "n > kChunk -> false",
    ): "n may be more than an int holds, and 64-bit counts take registers",
    (
        "layer_norm.cuh",
        "for (int64_t c = threadIdx.x * kChunk; c < width; c += kStride) {",
        "c < width -> c <= width",
    ): "the chunk that begins at the end is empty",
}


def families(file: str) -> list[str]:
    """The parts of GRID that use this file: of each source that with the longest name it begins with."""
    return list(dict.fromkeys(max(filter(source.startswith, GRID), key=len) for source in SOURCES[file]))


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    kind: str
    code: str  # of the line, before
    begin: int  # of what is changed in the line
    end: int
    replacement: str  # a statement if it ends with a semicolon, else an expression

    @property
    def change(self) -> str:
        return f"{lines_of(self.file)[self.line - 1][self.begin : self.end]} -> {self.replacement}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.code, self.change

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.code}  {self.change}"


def lines_of(file: str) -> list[str]:
    return (ROOT / "kernels/cuda" / file).read_text().split("\n")


PATTERNS = [
    ("barrier", re.compile(r"\b(warp_)?barrier\(\);"), ";"),
    ("wait", re.compile(r"\bcopy_wait<0>\(\);"), ";"),
    ("wait", re.compile(r"\bcopy_wait<0>\(\);"), "copy_wait<1>();"),
    ("wait", re.compile(r"\bwgmma_wait<\d>\(\);"), ";"),
    ("wait", re.compile(r"\bwgmma_wait<0>\(\);"), "wgmma_wait<1>();"),
    ("wait", re.compile(r"\bwait_for\(.*?\);"), ";"),
    ("wait", re.compile(r"\(tile - first_tile\) / 2 % 2"), "(tile - first_tile) / 2 % 2 ^ 1"),  # the other parity
    ("fence", re.compile(r"\b(fence_proxy_async|fence_mbarrier_init|wgmma_fence)\(\);"), ";"),
    ("bytes", re.compile(r"\bkBytes(?=\);)"), "kBytes / 2"),
    ("commit", re.compile(r"\b(copy|wgmma)_commit\(\);"), ";"),
    ("mask", re.compile(r"\b(mask_scores|fill_chunk)\(.*\);"), ";"),
    ("mask", re.compile(r"\bkept >> .+? & 1\b"), "true"),
    ("swizzle", re.compile(r"\bindex \^ swizzle\b"), "index"),
]
KINDS = ("barrier", "wait", "fence", "bytes", "commit", "mask", "check", "bound", "swizzle")
COMPARISON = re.compile(r" (<|<=|>|>=|==|!=) ")
WORD = r"!?(?!k[A-Z])[a-z][\w.]*"
FLAG = re.compile(  # a condition of one word: all of it, the first of several, or the last
    rf"(?<=if \(){WORD}(?=\))"
    rf"|(?:(?<=[\w\]] = )|(?<=[,&] )|(?<=\()|(?<=return )){WORD}(?= (?:&&|\?))"
    rf"|(?<=&& ){WORD}(?=[;),])"
)
LOOP = re.compile(r"\bfor \(\w+ \w+ = ([^;]*); [^;]*$")
ENDS = re.compile(r"&&|\|\||[?:;,{}]| [-+*|&^]?= |\breturn\b")
NAME = re.compile(r"[A-Za-z_]\w*")
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


def without(code: str, begin: int, end: int) -> list[str]:
    """Return replacements of a condition that make it check nothing."""
    before, after = code[:begin].rstrip(" !("), code[end:].lstrip(" )")
    if after.startswith("&&") or before.endswith("&&"):
        return ["true"]
    leaves = re.match(r"(return|continue)\b", after) is not None
    if after.startswith("||") or before.endswith("||") or leaves or code[begin] == "!":
        return ["false"]
    return ["true", "false"] if after.startswith("?") else ["true"]


def mutants_of(file: str) -> Iterator[Mutant]:
    previous = ""
    for number, line in enumerate(lines_of(file), 1):
        code = line.split("//")[0]
        unrolled, previous = previous.strip() == "#pragma unroll", line

        def mutant(kind: str, begin: int, end: int, replacement: str, number: int = number, code: str = code) -> Mutant:
            return Mutant(file, number, kind, code.strip(), begin, end, replacement)

        for kind, pattern, replacement in PATTERNS:
            for found in pattern.finditer(code):
                yield mutant(kind, *found.span(), replacement)
        if re.search(r"\bconstexpr\b|static_assert|^#|^template", code.strip()):
            continue
        for flag in FLAG.finditer(code):
            for value in without(code, *flag.span()):
                yield mutant("check", *flag.span(), value)
        for comparison in COMPARISON.finditer(code):
            begin, end = operand(code, comparison.start())
            condition = code[begin:end].rstrip()
            end = begin + len(condition)
            loop = LOOP.search(code[:begin])
            if loop and "&&" not in code[loop.end(1) : end + 3]:
                known = [*NAME.findall(loop[1]), *NAME.findall(code[comparison.end() : end])]
                if not unrolled and not all(map(CONSTANT.match, known)) and comparison[1] == "<":
                    yield mutant("bound", begin, end, condition.replace(" < ", " <= "))  # one turn more
                continue
            if all(map(CONSTANT.match, NAME.findall(condition))):
                continue  # known to the compiler
            for value in without(code, begin, end):
                yield mutant("check", begin, end, value)


def with_mutants(file: str, mutants: list[tuple[int, Mutant]]) -> str:
    """The text of the file with these mutations in it, each to be turned on by its number."""
    lines = lines_of(file)
    places: dict[tuple[int, int, int], list[tuple[int, Mutant]]] = {}
    for number, m in mutants:
        places.setdefault((m.line, m.begin, m.end), []).append((number, m))
    for (at, begin, end), here in sorted(places.items(), reverse=True):  # the last first: places stay where they are
        line = lines[at - 1]
        text = line[begin:end]
        for number, m in here:
            if m.replacement.endswith(";"):
                text = f"{{ if (is_mutant({number})) {{ {m.replacement} }} else {{ {text} }} }}"
            else:
                whole = f"bool({text})" if m.replacement in ("true", "false") else text  # a pointer, too
                text = f"(is_mutant({number}) ? {m.replacement} : {whole})"
        lines[at - 1] = line[:begin] + text + line[end:]
    return "\n".join(lines)


# ---- running ---------------------------------------------------------------------------------------------------------


def load(module: Path) -> Any:
    """Import this module as gptcore._simt, which must not be imported yet."""
    spec = importlib.util.spec_from_file_location("gptcore._simt", module)
    assert spec is not None
    assert spec.loader is not None
    simt = sys.modules["gptcore._simt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simt)
    return simt


def run_grid(module: Path, family: str, mutant: int | None) -> Any:
    """Return the results of a family's calls in this module: tensors and counters, or the first error message."""
    if mutant is not None:
        ctypes.c_int.in_dll(ctypes.CDLL(str(module)), "gptcore_mutant").value = mutant
    simt = load(module)
    simt.configure(threads=1, count=True, compute_capability=90 if family.endswith("_sm90") else 80)
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


def in_a_process(module: Path, family: str, mutant: int | None = None) -> Any:
    """run_grid in a fork of this process, which has never used a kernel."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                pickle.dump(run_grid(module, family, mutant), file)
                file.flush()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            ended_by = signal.Signals(os.WTERMSIG(status))
            return "never ends" if ended_by == signal.SIGXCPU else f"crashes with {ended_by.name}"
        file.seek(0)
        return pickle.load(file) if status == 0 else "raises another error"


def verdict(got: Any, expected: Any, slack: float = 1.0) -> str | None:
    """How a mutant was caught, or None. It may count up to `slack` times as much of anything."""
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
        if got[1][name] > count * slack:
            return f"more {name}"
    return None


# ---- compiling -------------------------------------------------------------------------------------------------------


SWITCH = """\
extern "C" { __attribute__((visibility("default"))) int gptcore_mutant = -1; }
namespace gptcore { bool is_mutant(int i) { return i == gptcore_mutant; } }
"""
SWITCH_HEADER = "namespace gptcore { __attribute__((const)) bool is_mutant(int i); }\n"


def build(
    mutants: list[Mutant], folder: Path, sources: Iterable[str] = (), flags: Iterable[str] = ("-O1",)
) -> tuple[Path, Path]:
    """gptcore._simt as CMake left it, and with these mutants of its kernels in it.

    What they are in is compiled with these flags, and so are these sources.
    """
    database = ROOT / f"build/cmake-{sys.implementation.cache_tag}/compile_commands.json"  # setup.py says where
    if not database.exists():
        raise SystemExit(f"no {database}: build the package first, with pip install -e .")
    for name in ("kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name)
    files = {mutant.file for mutant in mutants}
    for file in files:
        text = with_mutants(file, [(i, m) for i, m in enumerate(mutants) if m.file == file])
        (folder / "kernels/cuda" / file).write_text(text)
    (folder / "switch.h").write_text(SWITCH_HEADER)
    (folder / "switch.cpp").write_text(SWITCH)
    replaced = {*sources, *(source for file in files for source in SOURCES[file])}
    objects: list[Path] = []
    mutated: list[Path] = []
    jobs = [(["g++", "-O2", "-fPIC", "-c", "switch.cpp", "-o", "switch.o"], folder)]
    for entry in json.loads(database.read_text()):
        command = [word.replace(str(ROOT / "csrc"), str(folder / "csrc")) for word in shlex.split(entry["command"])]
        command = [f"-I{folder}" if word == f"-I{ROOT}" else word for word in command]
        at = command.index("-o") + 1
        if "simt" not in command[at]:
            continue
        output = database.parent / command[at]
        objects.append(output)
        if output.name.endswith(".cu.o") and Path(entry["file"]).stem in replaced:
            output = folder / output.name
            command[at] = str(output)
            jobs.append(([*command, *flags, "-w", "-include", str(folder / "switch.h")], database.parent))
        mutated.append(output)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda job: subprocess.run(job[0], cwd=job[1], stderr=subprocess.PIPE, text=True), jobs):
            if result.returncode:
                raise SystemExit(f"a mutant does not compile:\n{result.stderr[:4000]}")
    modules = folder / "original.so", folder / "mutants.so"
    for module, parts in zip(modules, (objects, [*mutated, folder / "switch.o"]), strict=True):
        subprocess.run(["g++", "-shared", "-fopenmp", "-o", module, *parts, "-ldl"], check=True)
    return modules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", choices=SOURCES, help="only of this file")
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--sample", type=int, help="so many at random; writes no table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
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
        original, mutated = build(mutants, Path(folder))
        needed = dict.fromkeys(family for mutant in mutants for family in families(mutant.file))
        expected = {}
        for family in needed:
            unchanged, expected[family] = (in_a_process(module, family) for module in (original, mutated))
            if isinstance(unchanged, str):
                raise SystemExit(f"{family} fails without a mutation: {unchanged}")
            # Compiled with other options, the kernels join their accesses a little differently.
            if fault := verdict(expected[family], unchanged, slack=1.01):
                raise SystemExit(f"{family} fails with no mutation turned on: {fault}")

        def caught(i: int) -> str | None:
            faults = (verdict(in_a_process(mutated, f, i), expected[f]) for f in families(mutants[i].file))
            return next(filter(None, faults), None)

        with ThreadPoolExecutor(args.jobs) as pool:
            for mutant, fault in zip(mutants, pool.map(caught, range(len(mutants))), strict=True):
                harmless = HARMLESS.get(mutant.key)
                survivors += fault is None and harmless is None
                result = fault or (f"survives: {harmless}" if harmless else "SURVIVES")
                rows.append((mutant, result))
                print(f"{len(rows)}/{len(mutants)} {mutant}: {result}", flush=True)
    if not args.sample and not args.file and not args.kind:
        TABLE.write_text(table(rows))
    print(f"{len(rows)} mutants, {survivors} survived without a reason")
    return 1 if survivors else 0


def row(mutant: Mutant, result: str) -> str:
    code, change = (text.replace("|", "\\|") for text in (mutant.code, mutant.change))
    return f"| {mutant.file} | `{code}` | `{change}` | {result} |"


def table(rows: list[tuple[Mutant, str]]) -> str:
    lines = [
        "# Mutants of the CUDA kernels",
        "",
        "Made by `python -m tools.mutants`. Each row is one line of a kernel, changed, and how it was caught: the rule",
        "that the model reported, or what the small grid found wrong, or what the model counted more of.",
        "",
        "| file | line | change | verdict |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row(*pair) for pair in rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
